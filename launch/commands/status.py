"""`python -m launch status`: the state of every stage of a run, from its run directory.

squeue is called once, for all unfinished jobs; the tables are printed without its answer too. A file that cannot be
read is reported under its run's table and counts as missing.
"""

from __future__ import annotations

import argparse
import re
import textwrap
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

from launch import run_folder
from launch.slurm.control_files import Ended, StartLog
from launch.slurm.queue import Queue, ask_squeue
from launch.slurm.submit import parse_jobs, stages_by_job
from pipeline.evaluation.result import EvaluationResult
from pipeline.recipe.file import load_resolved_recipe
from pipeline.recipe.stages import Stage
from pipeline.regular_file import read_regular
from pipeline.report.text_table import text_table
from pipeline.run.files import read_json, read_rows
from pipeline.run.layout import RunFolder, StageFolder, is_done
from pipeline.run.lease import is_stale, parse_holder
from pipeline.run.printable import printable
from pipeline.run.records import EvaluationProgress, StagePlan, StageResult, read_metric_rows

Value = TypeVar("Value")

WIDTH = 120
LONGEST_S = 1e12
"""Longer times are of damaged rows."""
COLUMNS = ["stage", "state", "progress", "%", "images/s", "robust %", "time left", "job", "SLURM", "restarts"]
TEXT_COLUMNS = ("stage", "state", "SLURM")
FAILED = ("BOOT_FAIL", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "TIMEOUT")
GONE = ("-", *FAILED, "CANCELLED", "COMPLETED", "PREEMPTED", "REVOKED")
"""States of jobs that have ended for good (`-`: unknown to SLURM); in any other state a job is queued or running."""


def add_parser(commands: Any) -> None:
    status = commands.add_parser(
        "status",
        help="progress, robust accuracy, time left and job state of every stage",
        description="Show stage, step, speed, robust accuracy, time left and SLURM job of runs. Changes nothing.",
    )
    status.add_argument(
        "runs", nargs="*", metavar="RUN", help="name of a run under runs/, or its folder (default: all)"
    )
    status.set_defaults(handler=_status)


def _status(arguments: argparse.Namespace) -> int:
    folders = [run_folder.find_run(name) for name in arguments.runs]
    print(printable(status_text(folders or sorted(path.parent for path in run_folder.RUNS.glob("*/recipe.yaml")))))
    return 0


def status_text(folders: list[Path]) -> str:
    """A headline and a table per run. Errors: ValueError if there is no run."""
    if not folders:
        raise ValueError(f"there is no run in {run_folder.RUNS}/; start one: python -m launch run RECIPE")
    runs: list[_Run | str] = []
    for folder in folders:
        try:
            runs.append(_Run(folder))
        except (OSError, ValueError) as error:
            runs.append(_wrap(f"{folder} cannot be shown: {error}"))
    queue, note = ask_squeue([job for run in runs if isinstance(run, _Run) for job in run.unfinished_jobs()])
    blocks = [run if isinstance(run, str) else run.table_text(queue) for run in runs]
    return "\n\n".join([*blocks, _wrap(note)] if note else blocks)


@dataclass
class _Part:
    """One stage, from the files in its folder."""

    stage: Stage
    done: bool
    trained: bool
    token: str | None  # the lease's, if its holder is alive
    started_at: float | None  # when its newest attempt wrote its first file
    total: int  # steps; 0 until a stage of the run has started
    step: int
    speed: float  # newest images/s; 0 until there is a row
    robust: str
    attacked: tuple[int, int]  # (done, total) images of the test set
    state: str = "waiting"

    def cells(self, batch: int) -> list[str]:
        speed = self.speed if self.state == "training" else 0
        done, total = self.attacked if self.state == "evaluating" else (self.step, self.total)
        progress = [f"{done}/{total}", f"{100 * done // total}"] if total else ["-", "-"]
        pace = [f"{speed:,.0f}", self.robust, _duration((total - done) * batch / speed)] if speed else None
        return [self.stage.name, self.state, *progress, *(pace or ["-", self.robust, "-"])]


class _Run:
    """One run, from its directory. Errors: ValueError if its recipe cannot be read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.notes: list[str] = []
        recipe = load_resolved_recipe(RunFolder(folder).recipe)
        self.batch = recipe.batch.batch_per_step
        jobs = self._read(folder / "jobs.json", parse_jobs)
        self.jobs = {job.job_name: job for job in jobs or []}  # the newest of each name
        self.starts = self._rows(StartLog.of(folder).path, lambda row: (row["group"], int(row["job"])))
        self.failures = self._rows(RunFolder(folder).logs / "failures.jsonl", _failure)
        stages = stages_by_job(recipe)
        self.parts_by_job = {name: [self._part(stage) for stage in job] for name, job in stages.items()}
        self.parts = [part for parts in self.parts_by_job.values() for part in parts]
        trained = [(part, part.stage.trained_by) for part in self.parts]
        per_epoch = next((part.total // phase.epochs for part, phase in trained if part.total and phase), 0)
        for part in self.parts:  # every stage has the same images per epoch
            part.total = part.total or per_epoch * part.stage.epochs
            part.step = part.total if part.trained else part.step
        self.ended = {name: self._how_it_ended(name) for name in self.jobs}

    def _read(self, path: Path, parse: Callable[[Any], Value]) -> Value | None:
        """`parse` of a JSON file; None if it does not exist. A damaged file is added to the notes."""
        try:
            return parse(read_json(path))
        except (KeyError, OSError, TypeError, ValueError) as error:
            if path.exists():
                self.notes.append(f"{path} is damaged: {str(error).removeprefix(f'{path} cannot be read: ')}")
            return None

    def _list(self, path: Path, read: Callable[[Path], list[Value]]) -> list[Value]:
        """`read` of a log or rows; empty if there is no such file. One that cannot be read is added to the notes."""
        try:
            return read(path) if path.exists() else []
        except (OSError, ValueError) as error:
            self.notes.append(str(error))
            return []

    def _rows(self, path: Path, parse: Callable[[Any], Value]) -> list[Value]:
        """`parse` of each line; damaged lines are skipped."""
        rows = []
        for row in self._list(path, read_rows):
            with suppress(KeyError, TypeError, ValueError):
                rows.append(parse(row))
        return rows

    def _part(self, stage: Stage) -> _Part:
        folder = self.folder / stage.name
        trained = self._read(StageFolder(folder).result, StageResult.parse) is not None
        done = trained and is_done(self.folder, stage)
        early_files = (StageFolder(folder).plan, StageFolder(folder).evaluations)
        rows = self._list(StageFolder(folder).metrics, read_metric_rows)
        held_out = [row.robust_accuracy for row in rows if row.kind == "validation" and row.robust_accuracy is not None]
        tested = self._read(StageFolder(folder).evaluation(stage.measure), _interval) if stage.measure else None
        attacked = self._read(StageFolder(folder).evaluation_progress, EvaluationProgress.parse)
        return _Part(
            stage,
            done,
            trained=trained,
            token=None if done else self._read(folder / "lease.json", _living_token),
            started_at=max((path.stat().st_mtime for path in early_files if path.exists()), default=None),
            total=self._read(StageFolder(folder).plan, lambda plan: StagePlan.parse(plan).total_steps) or 0,
            step=max((row.step for row in rows), default=0),
            speed=next((row.timing.images_per_s or 0.0 for row in reversed(rows) if row.kind == "train"), 0.0),
            robust=tested or (f"{100 * held_out[-1]:.1f} held-out" if held_out else "-"),
            attacked=(attacked.done, attacked.total) if attacked else (0, 0),
        )

    def _how_it_ended(self, name: str) -> tuple[int, str] | None:
        """(exit code, message) of the newest start of the newest job of this name; None unless it ended for good."""
        job = self.jobs[name].id
        # An array task, 12_3, runs under a job id of its own, which is not lower than the array's.
        first = int(job.partition("_")[0])
        job = str(next((number for group, number in reversed(self.starts) if group == name and number >= first), job))
        restarts = [path.name.rpartition("-")[2] for path in (self.folder / "control").glob(f"{job}-*")]
        newest = max((int(restart) for restart in restarts if restart.isdigit()), default=0)
        ended = self.folder / "control" / f"{job}-{newest}" / "ended.json"
        if (record := self._read(ended, Ended.parse)) is None:
            return None
        return record.code, record.message

    def unfinished_jobs(self) -> list[str]:
        complete = {name: all(part.done for part in parts) for name, parts in self.parts_by_job.items()}
        return [job.id for name, job in self.jobs.items() if not complete.get(name, self.ended[name] is not None)]

    def table_text(self, queue: Queue | None) -> str:
        """Headline, table and notes. `queue`: SLURM's job states, or None if they are unknown."""
        slurm = {name: (queue or {}).get(job.id, ("-", "None")) for name, job in self.jobs.items()}
        notes = self._set_states({name: state for name, (state, _) in slurm.items()})
        rows = [COLUMNS]
        for name, parts in self.parts_by_job.items():
            starts = [job_name for job_name, _ in self.starts if job_name == name]
            job = [self.jobs[name].id, slurm[name][0]] if name in self.jobs else ["-", "-"]
            rows += [[*part.cells(self.batch), *job, str(len(starts) - 1) if starts else "-"] for part in parts]
        # Pending reasons, and the report job, which has no row in the table.
        in_slurm = [(name, pair) for name, pair in slurm.items() if pair[0] != "-"]
        reasons = [pair for name, pair in in_slurm if pair[1] != "None" or name not in self.parts_by_job]
        for state, reason in dict.fromkeys(reasons):
            jobs = [f"{self.jobs[name].id} ({name})" for name, pair in slurm.items() if pair == (state, reason)]
            notes.append(f"{state}{'' if reason == 'None' else f', {reason}'}: {', '.join(jobs)}")
        states, queued = {part.state for part in self.parts}, any(state not in GONE for state, _ in slurm.values())
        word = "waiting for SLURM" if queued else "failed" if "failed" in states else "not running"
        if states & {"training", "evaluating"} or states == {"finished"}:
            word = "finished" if states == {"finished"} else "running"
        elif not queued and queue is not None:
            notes.append(self._how_to_continue())
        facts = [f"{self.folder}: {word}", *self._facts(word == "running")]
        table = _table([row if self.jobs else row[:-3] for row in rows])
        return "\n".join([", ".join(facts), table, *(_wrap(note, "  ") for note in [*notes, *self.notes])])

    def _how_to_continue(self) -> str:
        if not self.failures or not run_folder.has_trained_nothing(self.folder):
            return f"continue with: python -m launch resume {self.folder}"
        name = f" --name {self.folder.name}" if self.folder.parent == run_folder.RUNS else ""
        return f"nothing is trained yet: mend what failed, then start again: python -m launch run RECIPE{name}"

    def _set_states(self, slurm: dict[str, str]) -> list[str]:
        """Set the state of every stage; returns the failure messages of those that failed."""
        reasons: list[str] = []
        leading: set[str | None] = set()
        for name, parts in self.parts_by_job.items():
            first = next((part for part in parts if not part.done), None)
            for part in parts:
                if part.done:
                    part.state = "finished"
                elif part.token is not None:  # a job holds all its stages from its start
                    if part.token not in leading:
                        part.state = "evaluating" if part.trained else "training"
                    leading.add(part.token)
                elif slurm.get(name, "-") in GONE:
                    why = self._failure_messages(part, name, slurm.get(name)) if part is first else []
                    part.state = "failed" if why else "waiting" if part.started_at is None else "stopped"
                    reasons += why
        others = {
            name: ended for name, ended in self.ended.items() if ended is not None and name not in self.parts_by_job
        }
        return reasons + [f"{name}: {message}" for name, (code, message) in others.items() if code]

    def _failure_messages(self, part: _Part, name: str, slurm: str | None) -> list[str]:
        """Of a stage's job and workers, unless it has started again since."""
        code, message = self.ended.get(name) or (0, "")
        messages = [f"{name}: {message}"] if code else [f"{name}: SLURM has ended its job"] if slurm in FAILED else []
        # A failure before a worker's first stage names no stage. With several jobs it could be any.
        is_next = not self.jobs and part is next(other for other in self.parts if not other.done)
        failures = [row for row in self.failures if row[1] == part.stage.name or (row[1] is None and is_next)]
        if failures and (part.started_at is None or failures[-1][0] > part.started_at):
            messages.append(f"{part.stage.name}: {failures[-1][2]}")
        return messages

    def _facts(self, running: bool) -> list[str]:
        facts = [f"{sum(part.done for part in self.parts)} of {len(self.parts)} stages finished"]
        # At the speed of a stage that is training, or else of one that has trained.
        speeds = sorted((part.state == "training", part.speed) for part in self.parts if part.speed)
        left = sum(part.total - part.step for part in self.parts) * self.batch
        if running and left and speeds:
            together = ", one stage after the other" if self.jobs else ""
            facts.append(f"about {_duration(left / speeds[-1][1])} of training left{together}")
        log = RunFolder(self.folder).logs / "restarts.log"
        failed = len(self._list(log, lambda path: re.findall(rb"(?m)^attempt \w+ failed", read_regular(path))))
        if failed:
            facts.append(f"{failed} failed attempt{'s' * (failed > 1)} (logs/restarts.log)")
        return facts


def _table(rows: list[list[str]]) -> str:
    """Aligned lines; with narrow gaps if they would be too long otherwise."""
    table = text_table(rows, TEXT_COLUMNS)
    return table if max(map(len, table.splitlines())) <= WIDTH else text_table(rows, TEXT_COLUMNS, gap=1)


def _wrap(text: str, indent: str = "") -> str:
    lines = textwrap.wrap(textwrap.shorten(text, 600), WIDTH - 4, break_long_words=False, break_on_hyphens=False)
    return indent + f"\n{indent}  ".join(lines)


def _duration(seconds: float) -> str:
    if seconds > LONGEST_S:
        return "-"
    days, rest = divmod(round(seconds), 86400)
    return f"{days} d {rest // 3600} h" if days else str(timedelta(seconds=rest))


def _failure(row: Any) -> tuple[float, str | None, str]:
    """(time, stage if one had started, what happened)"""
    return float(row["time"]), row["stage"], f"failed at step {row['step']}: {row['error']}"


def _interval(evaluation: Any) -> str:
    accuracy = EvaluationResult.parse(evaluation).robust_accuracy
    value, low, high = (100 * share for share in (accuracy.value, accuracy.low, accuracy.high))
    return f"{value:.1f} [{low:.1f}, {high:.1f}]"


def _living_token(lease: Any) -> str | None:
    return None if is_stale(holder := parse_holder(lease)) else holder.token
