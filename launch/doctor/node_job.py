"""The checks inside a SLURM job, on every node, and their lines gathered where the job was submitted.

Nodes talk through a folder below the working folder, so that what arrives proves that they see it:

    token                a random text, which every node must read as it was submitted
    node-<n>.jsonl       first {"host", "hosts"}, then a line per check, then {"done": true}
    jobs/                submitit's files, and the logs of the job
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.doctor.checks import checks_of
from launch.doctor.outcome import Outcome, Subject
from launch.doctor.process import run_check
from launch.slurm.queue import ask_squeue
from launch.slurm.sbatch import section_of
from launch.slurm.submit import run_client, submit_work
from pipeline.recipe.schema import Recipe
from pipeline.run.files import atomic_write_text, open_to_append, read_rows, read_whole

JOB_NAME = "doctor"
MINUTES = 30
"""Time limit of the job; a recipe's shorter one stays."""
POLL_S = 2.0
OTHERS_S = 60.0
"""How long a node waits until it sees the files of the others: a network file system may show them late."""
UNKNOWN_S = 60.0
"""How long the job may be unknown to squeue, just submitted or just ended, and how long its last lines may take."""
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE")
SHARED = "shared folder"
"""Name of the check that only several machines can do."""

Show = Callable[[str, str], None]
"""Called with (host, line) for every line of a node."""


@dataclass
class NodeChecks:
    """The submitted object. Plain values only, as submitit pickles it."""

    folder: str
    token: str
    subject: dict[str, Any]

    def __call__(self) -> None:
        import submitit

        node, hosts = int(os.environ["SLURM_PROCID"]), list(submitit.JobEnvironment().hostnames)
        file = Path(self.folder) / f"node-{node}.jsonl"
        atomic_write_text(file, json.dumps({"host": hosts[node], "hosts": hosts}) + "\n")  # also when SLURM requeues it

        def add(row: dict[str, Any]) -> None:
            with open_to_append(file) as stream:
                stream.write(json.dumps(row) + "\n")

        shared = check_shared_folder(Path(self.folder), self.token, hosts)
        add({"line": shared.line(SHARED), "status": shared.status})
        subject = Subject(**{**self.subject, "reads_files": node == 0})
        for check in checks_of(subject):
            outcome = run_check(check, subject, lambda done, total: None)
            add({"line": outcome.line(check.name), "status": outcome.status})
        add({"done": True})


def check_shared_folder(folder: Path, token: str, hosts: list[str], deadline_s: float = OTHERS_S) -> Outcome:
    """Whether this node sees what was written where the job was submitted, and what the other nodes write now."""
    fix = "work in a folder on a file system that all nodes mount at the same path"
    try:
        if read_whole(folder / "token").decode() != token:
            return Outcome("fail", f"{folder} is another folder here than where the job was submitted", fix)
    except (OSError, ValueError) as error:
        return Outcome("fail", f"{folder} is not seen here: {error}", fix)
    end, pause = time.monotonic() + deadline_s, threading.Event()
    while missing := [host for n, host in enumerate(hosts) if not (folder / f"node-{n}.jsonl").exists()]:
        if time.monotonic() > end:
            return Outcome("fail", f"nothing of {', '.join(missing)} is seen here within {deadline_s:g} s", fix)
        pause.wait(0.5)
    return Outcome("pass", f"{folder.parent} is the same here; what {len(hosts)} nodes write there is seen")


def run_on_nodes(recipe: Recipe, subject: Subject, show: Show, progress: Callable[[str], None]) -> bool:
    """Submit the checks as a job of the recipe's slurm section, show the lines of every node; True without a failure.

    Waits for the job as long as it is queued; an interrupt cancels it. Errors: ValueError if SLURM refuses the job.
    """
    slurm = section_of(recipe)
    limits = {"time": min(slurm.time, MINUTES), "signal_s": 10, "mail_user": None, "mail_type": None}
    recipe = recipe.model_copy(update={"slurm": slurm.model_copy(update=limits)})
    with _shared_folder() as folder:
        token = os.urandom(16).hex()
        atomic_write_text(folder / "token", token)
        work = NodeChecks(str(folder), token, subject.to_json())
        (job,) = submit_work(recipe, folder, JOB_NAME, [work], None)
        try:
            gathered = _gather(folder, job, show, progress)
        except BaseException:
            with suppress(ValueError):
                run_client("scancel", job)
            raise
        return gathered


@contextmanager
def _shared_folder() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="hydra-doctor-", dir=Path.cwd()))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _gather(folder: Path, job: str, show: Show, progress: Callable[[str], None]) -> bool:
    """Show lines as they arrive, until every node is done, or the job has ended."""
    shown: dict[Path, int] = {}
    hosts: list[str] = []
    well, seen, state = True, time.monotonic(), "PENDING"
    pause = threading.Event()
    while True:
        finished = 0
        for file in sorted(folder.glob("node-*.jsonl")):
            first, *rows = read_rows(file) or [{}]
            hosts = first.get("hosts", hosts)
            for row in rows[shown.get(file, 0) :]:
                if "line" in row:
                    show(first["host"], row["line"])
                    well = well and row["status"] != "fail"
                finished += "done" in row
            shown[file] = len([row for row in rows if "line" in row])
        if hosts and finished == len(hosts):
            return well
        queue, reason = ask_squeue([job])
        if queue and job in queue:
            state, cause = queue[job]
            progress(f"job {job}: {state}{f' ({cause})' if cause not in ('', 'None') else ''}")
        elif queue is None:
            progress(f"job {job}: {reason}")
        if state not in ENDED and (queue is None or job in queue):
            seen = time.monotonic()
        if time.monotonic() - seen > UNKNOWN_S:
            break
        pause.wait(POLL_S)
    for number, host in enumerate(hosts or _hosts_of(job)):
        rows = read_rows(folder / f"node-{number}.jsonl")
        if not any("done" in row for row in rows):
            show(host, _missing(folder, job, number, state, len(rows)).line(SHARED if not rows else "checks"))
    return False


def _missing(folder: Path, job: str, number: int, state: str, rows: int) -> Outcome:
    log = folder / "jobs" / f"{job}_{number}_log.err"
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    last = f"; its log ends with: {lines[-1]}" if lines else ""
    if rows:
        return Outcome("fail", f"the job ended ({state}) before this node was done{last}", "see the line before")
    return Outcome(
        "fail",
        f"nothing of this node arrived in {folder.parent} (job {job}: {state}){last}",
        "work in a folder that the nodes mount at the same path, this Python included",
    )


def _hosts_of(job: str) -> list[str]:
    """The nodes of a job that has ended; 'job ID' if SLURM no longer knows."""
    with suppress(ValueError):
        nodes = run_client("squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%N").strip()
        if nodes:
            return run_client("scontrol", "show", "hostnames", nodes).split()
    return [f"job {job}"]
