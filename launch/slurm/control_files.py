"""What the nodes of one job tell each other: small files in the run directory, the only thing they all see.

    control/starts.jsonl                      one line per start of a job, for counting those without progress
    control/<job>-<restart>/                  one start of one job (SLURM counts its restarts)
        counted                               it stands in starts.jsonl, so that it may be queued again
        token                                 the Ray cluster's, 0600
        cluster-<generation>.json             the head is up: where
        lost-<generation>-<node>              a node's Ray processes ended
        failed-<generation>                   why it ended, where somebody could say it
        alive-<node>                          heartbeat of a node's task
        stop                                  workers stop with a checkpoint at the next step
        ended.json                            the start is over for good: {"code", "message"}

A generation is one Ray cluster. Whatever happens to one, all nodes end theirs and join the next.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.run.files import atomic_write_json, atomic_write_text, read_json, read_json_if_there, read_rows

ALIVE_EVERY_S = 2.0
"""How often a task renews its heartbeat."""


class JobFailed(RuntimeError):
    """This start of the job is over. Whether SLURM queues it again is decided by whether `ended.json` is there."""


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
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    def count(self) -> None:
        """The batch script may queue the job again if this start fails; training starts are in `Starts` by then, which
        bounds how often."""
        (self.folder / "counted").touch()

    def was_counted(self) -> bool:
        return (self.folder / "counted").exists()

    def was_replaced(self) -> bool:
        """Whether SLURM has started the job once more, while this start's node was taken for lost."""
        job, _, restart = self.folder.name.rpartition("-")
        return (self.folder.parent / f"{job}-{int(restart) + 1}").exists()

    def publish(self, generation: int, address: str) -> None:
        atomic_write_json(self.folder / f"cluster-{generation}.json", {"address": address})

    def address(self, generation: int) -> str | None:
        """Where the generation's head listens; None while it is not up."""
        path = self.folder / f"cluster-{generation}.json"
        return read_json(path)["address"] if path.exists() else None

    def lose(self, generation: int, node: int) -> None:
        (self.folder / f"lost-{generation}-{node}").touch()

    def lost(self, generation: int) -> list[int]:
        """Nodes whose Ray processes ended in this generation."""
        return sorted(int(path.name.rpartition("-")[2]) for path in self.folder.glob(f"lost-{generation}-*"))

    def fail(self, generation: int, why: str) -> None:
        atomic_write_text(self.folder / f"failed-{generation}", f"{why}\n")

    def failure(self, generation: int) -> str | None:
        """Why a generation ended, if somebody has said so."""
        path = self.folder / f"failed-{generation}"
        return path.read_text(encoding="utf-8").strip() if path.exists() else None

    def last_failure(self) -> str | None:
        """Of all generations."""
        generations = [int(path.name.rpartition("-")[2]) for path in self.folder.glob("failed-*")]
        return self.failure(max(generations)) if generations else None

    def beat(self, node: int) -> None:
        atomic_write_text(self.folder / f"alive-{node}", f"{time.time()}\n")

    def silent(self, node: int, deadline_s: float) -> bool:
        """Whether a node that was heard of has not been for longer than the deadline; their clocks must agree."""
        path = self.folder / f"alive-{node}"
        try:
            return time.time() - float(path.read_text()) > deadline_s
        except (OSError, ValueError):
            return False

    def end(self, code: int, message: str) -> None:
        atomic_write_json(self.folder / "ended.json", {"code": code, "message": message})

    def ended(self) -> dict[str, Any] | None:
        return read_json_if_there(self.folder / "ended.json")


@dataclass(frozen=True)
class StartLog:
    """The starts of a run's jobs, kept to tell those that lead nowhere."""

    path: Path

    @staticmethod
    def of(run_folder: Path) -> StartLog:
        return StartLog(run_folder / "control" / "starts.jsonl")

    def read(self) -> list[dict[str, Any]]:
        return read_rows(self.path)

    def without_progress(self, job_name: str, job: str, marks: list[int]) -> int:
        """How many starts of this job in a row, the newest first, found exactly what is there now.

        Those of other jobs do not count: who submits the run again has looked at what stopped it.
        """
        count = 0
        for start in reversed([s for s in self.read() if s["group"] == job_name and s["job"] == job]):
            if start["marks"] != marks:
                break
            count += 1
        return count

    def add(self, job_name: str, job: str, restart: str, nodes: int, marks: list[int]) -> None:
        line = {"time": time.time(), "group": job_name, "job": job, "restart": restart, "nodes": nodes, "marks": marks}
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")


def start_of_job() -> tuple[str, str]:
    """(job id, how often SLURM has queued it again)."""
    return os.environ["SLURM_JOB_ID"], os.environ.get("SLURM_RESTART_COUNT", "0")


def begin(run_folder: Path, job_name: str, nodes: int, marks: list[int], limit: int) -> None:
    """Count this start of a job, and so let it be queued again. Errors: JobFailed if the last ones led nowhere."""
    (job, restart), starts = start_of_job(), StartLog.of(run_folder)
    control, before = (ControlFiles.of(run_folder, job, str(number)) for number in (restart, int(restart) - 1))
    count = starts.without_progress(job_name, job, marks)
    starts.add(job_name, job, restart, nodes, marks)
    control.count()
    if count > 2 * limit + 1:
        last = f" (last: {why})" if (why := before.last_failure()) is not None else ""
        why = (
            f"{run_folder}: {job_name} was started {count} times without anything new committed{last}; "
            f"mend the cause (see jobs/ and logs/), then: python -m launch resume {run_folder}"
        )
        control.end(1, why)
        raise JobFailed(why)
