"""What squeue says of the jobs of runs."""

from __future__ import annotations

import shutil
import subprocess

Queue = dict[str, tuple[str, str]]
"""job -> (state, reason), as squeue says."""


SQUEUE_S = 20.0
"""How long squeue may take."""


def ask_squeue(jobs: list[str]) -> tuple[Queue | None, str]:
    """(what squeue knows of the jobs, or None without an answer; why there is none)."""
    if not jobs:
        return {}, ""
    if shutil.which("squeue") is None:
        return None, "what waits in SLURM is not known: squeue is not on this machine"
    # One line for each element of an array, and jobs that have just ended too.
    command = ["squeue", "-h", "-r", "-t", "all", "-o", "%i %T %r", "-j", ",".join(jobs)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SQUEUE_S)
    except subprocess.TimeoutExpired:
        return None, f"what waits in SLURM is not known: squeue did not answer in {SQUEUE_S:g} s"
    except OSError as error:
        return None, f"what waits in SLURM is not known: {error}"
    if done.returncode and "Invalid job id" not in done.stderr:  # so it calls a job that it has forgotten
        return None, f"what waits in SLURM is not known: squeue ended with {done.returncode}, {done.stderr.strip()}"
    lines = [line.split(maxsplit=2) for line in done.stdout.splitlines()]
    return {line[0]: (line[1], line[2]) for line in lines if len(line) == 3}, ""
