"""Communication among the nodes of one job: small files in the run directory, which all of them see.

    control/starts.jsonl                      one line per start of a job, to count starts without progress
    control/<job>-<restart>/                  one start of one job (SLURM numbers its restarts)
        counted                               the start is in starts.jsonl, so the job may be requeued
        token                                 the Ray cluster's token, 0600
        cluster-<generation>.json             address of the head, once it is up
        lost-<generation>-<node>              the node's Ray processes ended
        failed-<generation>                   why the generation ended, if known
        alive-<node>                          heartbeat of the node's task
        stop                                  workers write a checkpoint at the next step and stop
        ended.json                            the job is over for good: {"code", "message"}

A generation is one Ray cluster. When one fails, all nodes end their part of it and join the next.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.run.files import (
    atomic_write_json,
    atomic_write_text,
    make_folder,
    open_to_append,
    read_rows,
    read_whole,
    touch,
)
from pipeline.run.records import Record

ALIVE_EVERY_S = 2.0
"""How often a task renews its heartbeat."""


class Ended(Record):
    """ended.json."""

    code: int
    message: str


class _Cluster(Record):
    """cluster-<generation>.json."""

    address: str


class JobFailed(RuntimeError):
    """This start of the job is over. The batch script requeues the job unless `ended.json` exists."""


@dataclass(frozen=True)
class ControlFiles:
    """The folder of one start of one job."""

    folder: Path

    @staticmethod
    def of(run_folder: Path, job: str, restart: str) -> ControlFiles:
        return ControlFiles(run_folder / "control" / f"{job}-{restart}")

    @property
    def token(self) -> Path:
        return self.folder / "token"

    @property
    def stop(self) -> Path:
        return self.folder / "stop"

    def create(self) -> None:
        make_folder(self.folder, mode=0o700)

    def mark_counted(self) -> None:
        """Allow the batch script to requeue the job if this start fails; `StartLog`, which has it, bounds how often."""
        touch(self.folder / "counted")

    def was_counted(self) -> bool:
        return (self.folder / "counted").exists()

    def was_replaced(self) -> bool:
        """Whether SLURM has started the job again because it considers this start's node lost."""
        job, _, restart = self.folder.name.rpartition("-")
        return (self.folder.parent / f"{job}-{int(restart) + 1}").exists()

    def publish(self, generation: int, address: str) -> None:
        atomic_write_json(self.folder / f"cluster-{generation}.json", {"address": address})

    def address(self, generation: int) -> str | None:
        """Address of the generation's head; None until it is up."""
        path = self.folder / f"cluster-{generation}.json"
        cluster = _Cluster.read_if_there(path)
        return cluster.address if cluster is not None else None

    def mark_lost(self, generation: int, node: int) -> None:
        touch(self.folder / f"lost-{generation}-{node}")

    def lost_nodes(self, generation: int) -> list[int]:
        """Nodes whose Ray processes ended in this generation."""
        return sorted(int(path.name.rpartition("-")[2]) for path in self.folder.glob(f"lost-{generation}-*"))

    def record_failure(self, generation: int, reason: str) -> None:
        atomic_write_text(self.folder / f"failed-{generation}", f"{reason}\n")

    def failure(self, generation: int) -> str | None:
        """Why a generation ended, if that was recorded."""
        path = self.folder / f"failed-{generation}"
        return read_whole(path).decode(errors="replace").strip() if path.exists() else None

    def last_failure(self) -> str | None:
        """Of the newest generation that has one."""
        generations = [int(path.name.rpartition("-")[2]) for path in self.folder.glob("failed-*")]
        return self.failure(max(generations)) if generations else None

    def beat(self, node: int) -> None:
        atomic_write_text(self.folder / f"alive-{node}", f"{time.time()}\n")

    def is_silent(self, node: int, deadline_s: float) -> bool:
        """Whether the node's last heartbeat, if any, is older than the deadline. The nodes' clocks must agree."""
        path = self.folder / f"alive-{node}"
        try:
            return time.time() - float(read_whole(path)) > deadline_s
        except (OSError, ValueError):
            return False

    def end(self, code: int, message: str) -> None:
        atomic_write_json(self.folder / "ended.json", {"code": code, "message": message})

    def ended(self) -> dict[str, Any] | None:
        ended = Ended.read_if_there(self.folder / "ended.json")
        return ended.model_dump() if ended is not None else None


@dataclass(frozen=True)
class StartLog:
    """The starts of a run's jobs, to bound those without progress."""

    path: Path

    @staticmethod
    def of(run_folder: Path) -> StartLog:
        return StartLog(run_folder / "control" / "starts.jsonl")

    def read(self) -> list[dict[str, Any]]:
        return read_rows(self.path)

    def without_progress(self, job_name: str, job: str, marks: list[int]) -> int:
        """Number of newest starts of this job in a row that began with the current progress `marks`.

        Other jobs do not count: a person who resubmits the run has seen why it stopped.
        """
        count = 0
        for start in reversed([s for s in self.read() if s["group"] == job_name and s["job"] == job]):
            if start["marks"] != marks:
                break
            count += 1
        return count

    def add(self, job_name: str, job: str, restart: str, nodes: int, marks: list[int]) -> None:
        line = {"time": time.time(), "group": job_name, "job": job, "restart": restart, "nodes": nodes, "marks": marks}
        with open_to_append(self.path) as stream:
            stream.write(json.dumps(line) + "\n")


def start_of_job() -> tuple[str, str]:
    """(job id, SLURM's restart count)."""
    return os.environ["SLURM_JOB_ID"], os.environ.get("SLURM_RESTART_COUNT", "0")


def count_start(run_folder: Path, job_name: str, nodes: int, marks: list[int], limit: int) -> None:
    """Count this start of a job, which lets it be requeued.

    Errors: JobFailed after too many starts without progress.
    """
    (job, restart), starts = start_of_job(), StartLog.of(run_folder)
    control, previous = (ControlFiles.of(run_folder, job, str(number)) for number in (restart, int(restart) - 1))
    count = starts.without_progress(job_name, job, marks)
    starts.add(job_name, job, restart, nodes, marks)
    control.mark_counted()
    if count > 2 * limit + 1:
        last = f" (last: {reason})" if (reason := previous.last_failure()) is not None else ""
        message = (
            f"{run_folder}: {job_name} was started {count} times without anything new committed{last}; "
            f"fix the cause (see jobs/ and logs/), then: python -m launch resume {run_folder}"
        )
        control.end(1, message)
        raise JobFailed(message)
