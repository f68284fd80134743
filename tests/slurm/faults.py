"""Faults that a cluster inflicts on a running job, and how the job recovers from each.

Every fault is real: SLURM's own commands, or a signal to the process itself. Each is inflicted while a worker is inside
a step or a save (`throttle`), and is survived once a later step has been logged. Faults that SLURM causes with a delay,
such as a time limit, are requested at that moment.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from pipeline.run.layout import progress_marks
from tests.slurm.throttle import FOLDER, SLOWLY, inside
from tests.support.commands import wait_until
from tests.support.slurm_cluster import SlurmCluster

RECOVERY_S = 240
"""How long a job may take to train again."""
Act = Callable[[], object]


@dataclass(frozen=True)
class Outcome:
    """What one fault did."""

    kind: str
    place: str
    """What it interrupted: a step or a save."""
    at_step: int
    """The newest step logged before it."""
    resumed_from: int
    """The checkpoint that the job resumed from."""
    recovered_s: float
    """Until the next step was logged."""

    @property
    def lost_steps(self) -> int:
        """Steps computed twice; none if the job wrote a checkpoint after the fault."""
        return max(0, self.at_step - self.resumed_from)


class Victim:
    """One running job of a run on the cluster, and the stage that it trains."""

    def __init__(self, cluster: SlurmCluster, run_folder: Path, job: str, stage: str) -> None:
        self.cluster, self.run_folder, self.job, self.stage = cluster, run_folder, job, stage

    # --- observing ----------------------------------------------------------------------------------------------------

    def rows(self) -> list[dict[str, Any]]:
        path = self.run_folder / self.stage / "metrics.jsonl"
        if not path.exists():
            return []
        lines = path.read_bytes().splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith(b"\n")]

    def step(self) -> int:
        """The newest step logged."""
        return max((row["step"] for row in self.rows()), default=0)

    def checkpoint(self) -> int:
        return progress_marks(self.run_folder, [self.stage])[0]

    def finished(self) -> bool:
        return (self.run_folder / self.stage / "result.json").exists()

    def wait_for_step(self, step: int, deadline_s: float = RECOVERY_S) -> None:
        wait_until(lambda: self.step() >= step or self.finished(), deadline_s, f"step {step} of {self.stage}")
        assert not self.finished(), f"{self.stage} finished before step {step} could be disturbed"

    def processes(self, what: Callable[[psutil.Process], bool]) -> list[psutil.Process]:
        matches = []
        for process in self.cluster.processes():
            try:
                if what(process):
                    matches.append(process)
            except psutil.NoSuchProcess:
                continue
        return sorted(matches, key=lambda process: process.pid)

    def one(self, what: Callable[[psutil.Process], bool], name: str, index: int = 0) -> psutil.Process:
        matches = self.processes(what)
        assert matches, f"there is no {name} to strike"
        return matches[index % len(matches)]

    # --- striking -----------------------------------------------------------------------------------------------------

    def strike(self, kind: str, index: int, place: str) -> Outcome:
        """Inflict one fault during the next step or save, and return when the job trains again.

        `index` chooses among several victims.
        """
        starts = self._starts()
        blow, heal = getattr(self, f"_{kind}")(index)
        marker = self._wait_until_inside(place)
        before, struck_at = self.step(), time.monotonic()
        blow()
        assert marker.exists() or not kind.startswith(SIGNALS), f"{kind} came after the {place} it was meant for"
        # Rows are truncated to the checkpoint that the job resumes from, then grow: the next start in the log names it.
        wait_until(lambda: len(self._starts()) > len(starts), RECOVERY_S, f"another start after {kind}")
        resumed = self._starts()[len(starts)]
        wait_until(lambda: self.step() > resumed, RECOVERY_S, f"a step after {kind}")
        recovered = time.monotonic() - struck_at
        if heal is not None:
            heal()
        return Outcome(kind, place, before, resumed, recovered)

    def _wait_until_inside(self, place: str) -> Path:
        folder, matches = Path(os.environ[FOLDER]), []

        def is_inside_or_finished() -> bool:
            mark = inside(folder, place)
            matches.extend([mark] if mark is not None else [])
            return mark is not None or self.finished()

        wait_until(is_inside_or_finished, RECOVERY_S, f"a worker inside a {place} of {self.stage}", every_s=0.01)
        assert matches, f"{self.stage} finished before a {place} could be struck"
        return matches[0]

    def _starts(self) -> list[int]:
        """The steps at which the stage started, from rank 0's log."""
        path = self.run_folder / "logs" / "worker-0.log"
        text = path.read_text(errors="replace") if path.exists() else ""
        mark = f"{self.stage}: starting at step "
        return [int(line.split(mark)[1].split()[0]) for line in text.splitlines() if mark in line]

    # Each returns the fault, and what undoes it once the job trains again.

    def _warning(self, index: int) -> tuple[Act, Act | None]:
        return partial(self.cluster.client, "scancel", "--signal=USR2", self.job), None

    def _requeue(self, index: int) -> tuple[Act, Act | None]:
        return partial(self.cluster.client, "scontrol", "requeue", self.job), None

    def _preemption(self, index: int) -> tuple[Act, Act | None]:
        nodes, rivals = len(self.cluster.nodes), list[str]()

        def blow() -> None:
            rivals.append(
                self.cluster.submit(
                    "--partition=high", f"--nodes={nodes}", "--exclusive", "--output=/dev/null", "--wrap=srun sleep 5"
                )
            )

        return blow, lambda: self.cluster.wait_for_state(rivals[0], "COMPLETED", 60)

    def _unwarned_preemption(self, index: int) -> tuple[Act, Act | None]:
        """On a cluster whose warnings are off, which it must be set to while no job runs."""
        return self._preemption(index)

    def _time_limit(self, index: int) -> tuple[Act, Act | None]:
        def limit(minutes: int) -> None:
            self.cluster.client("scontrol", "update", f"JobId={self.job}", f"TimeLimit={minutes}")

        def blow() -> None:
            elapsed = self.cluster.client("squeue", "-h", "-j", self.job, "-o", "%M").strip()
            parts = zip(reversed(elapsed.split(":")), (1 / 60, 1, 60), strict=False)
            # One to two minutes from now: the next check for a warning is within 30 s, and the job then needs some.
            slowly.touch()  # or else the stage is finished by then
            limit(int(sum(int(part) * unit for part, unit in parts)) + 2)

        def heal() -> None:
            slowly.unlink()
            limit(60)

        slowly = Path(os.environ[FOLDER]) / SLOWLY
        return blow, heal

    def _node_down(self, index: int) -> tuple[Act, Act | None]:
        nodes = self.cluster.job_nodes(self.job)
        node = nodes[index % len(nodes)]

        def back() -> None:
            if self.cluster.node_state(node) == "down":  # else its daemon has already reported back
                self.cluster.client("scontrol", "update", f"NodeName={node}", "State=resume")

        return partial(
            self.cluster.client, "scontrol", "update", f"NodeName={node}", "State=down", "Reason=fault"
        ), back

    def _kill_step(self, index: int) -> tuple[Act, Act | None]:
        """SIGKILL of the slurmstepd of the job's step on one node."""
        step = f"[{self.job}.0]"
        return self.one(
            lambda p: p.name() == "slurmstepd" and step in " ".join(p.cmdline()), "slurmstepd", index
        ).kill, None

    def _kill_raylet(self, index: int) -> tuple[Act, Act | None]:
        return self.one(lambda p: p.name() == "raylet", "raylet", index).kill, None

    def _kill_head(self, index: int) -> tuple[Act, Act | None]:
        return self.one(lambda p: p.name().startswith("gcs_server"), "GCS").kill, None

    def _kill_worker(self, index: int) -> tuple[Act, Act | None]:
        return self.one(_is_worker, "worker", index).kill, None

    def _stop_worker(self, index: int) -> tuple[Act, Act | None]:
        return self.one(_is_worker, "worker", index).suspend, None

    def _kill_driver(self, index: int) -> tuple[Act, Act | None]:
        return self.one(lambda p: "launch.slurm.driver_main" in p.cmdline(), "driver").kill, None


def _is_worker(process: psutil.Process) -> bool:
    return "RayTrainWorker" in " ".join(process.cmdline())


KINDS = (
    "warning",
    "requeue",
    "preemption",
    "unwarned_preemption",
    "time_limit",
    "node_down",
    "kill_step",
    "kill_raylet",
    "kill_head",
    "kill_worker",
    "stop_worker",
    "kill_driver",
)
"""What `Victim.strike` can inflict."""
SIGNALS = ("kill_", "stop_")
"""Prefixes of the kinds that act at once."""


def as_row(outcome: Outcome) -> dict[str, Any]:
    return {**asdict(outcome), "lost_steps": outcome.lost_steps}
