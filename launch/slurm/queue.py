"""Job states from squeue."""

from __future__ import annotations

import shutil
import subprocess

Queue = dict[str, tuple[str, str]]
"""job id -> (state, reason), in squeue's words."""

SQUEUE_S = 20.0
"""Deadline of squeue."""


def ask_squeue(jobs: list[str]) -> tuple[Queue | None, str]:
    """(states of the jobs that squeue knows, or None without an answer; why there is no answer)."""
    if not jobs:
        return {}, ""
    if shutil.which("squeue") is None:
        return None, "job states are unknown: squeue is not on this machine"
    # One line per array task; jobs that have just ended too.
    command = ["squeue", "-h", "-r", "-t", "all", "-o", "%i %T %r", "-j", ",".join(jobs)]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=SQUEUE_S)
    except subprocess.TimeoutExpired:
        return None, f"job states are unknown: squeue did not answer in {SQUEUE_S:g} s"
    except OSError as error:
        return None, f"job states are unknown: {error}"
    if result.returncode and "Invalid job id" not in result.stderr:  # its answer for jobs that it no longer keeps
        return None, f"job states are unknown: squeue ended with {result.returncode}, {result.stderr.strip()}"
    lines = [line.split(maxsplit=2) for line in result.stdout.splitlines()]
    return {line[0]: (line[1], line[2]) for line in lines if len(line) == 3}, ""
