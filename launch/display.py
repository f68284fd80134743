"""Shows a run's progress, reading only its run directory: bars on a terminal, plain lines in a log.

The run may be in this process or in another. At any moment a file may be missing, end in half a line, or be truncated
(a resumed stage drops the metric rows beyond its checkpoint).
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, TextIO, TypeVar

from tqdm import tqdm

from pipeline.evaluation.result import KINDS, EvaluationResult
from pipeline.regular_file import open_regular
from pipeline.run.files import parse_row
from pipeline.run.layout import HONESTY, StageFolder
from pipeline.run.printable import printable
from pipeline.run.records import EvaluationProgress, MetricRow, StagePlan, StageResult

Value = TypeVar("Value")
BAR = "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}{postfix}"


def follow(
    run_folder: Path,
    evaluations: Mapping[str, Sequence[str]],
    stop: threading.Event,
    stream: TextIO,
    *,
    interval_s: float = 1.0,
    line_every_s: float = 5.0,
) -> None:
    """Show the stages of a run until `stop` is set, and then once more, so that the last results are shown.

    `evaluations` maps each stage's name to its `Stage.evaluations`. Polls every `interval_s`
    seconds; without a terminal a training stage prints at most one line per `line_every_s` seconds.
    """
    seconds: dict[str, float] = {}
    stages = [_Stage(name, run_folder / name, list(labels), seconds) for name, labels in evaluations.items()]
    view = _Bars(stream) if stream.isatty() else _Lines(stream, line_every_s)
    for stage in stages:
        if StageFolder(stage.folder).result.exists():
            stage.finished = True
            stage.pending = [name for name in stage.pending if not StageFolder(stage.folder).evaluation(name).exists()]
            view.print_line(f"{stage.name}  already finished")
        stage.tail.read()  # earlier rows are not shown
    stopping = False
    try:
        while True:
            for stage in stages:
                _update(stage, view)
            if stopping:
                return
            stopping = stop.wait(interval_s)
    finally:
        view.close()


@dataclass
class _Tail:
    """The rows appended to a metrics file since the last read; starts over when the file is truncated or replaced."""

    path: Path
    _inode: int = -1
    _offset: int = 0

    def read(self) -> tuple[list[MetricRow], bool]:
        """(new whole rows, whether the file was truncated or replaced)."""
        try:
            stream = open_regular(self.path)
        except OSError:
            return [], False
        with stream:
            status = os.fstat(stream.fileno())
            restarted = self._inode != -1 and (status.st_ino != self._inode or status.st_size < self._offset)
            if restarted:
                self._offset = 0
            self._inode = status.st_ino
            stream.seek(self._offset)
            whole, newline, _ = stream.read().rpartition(b"\n")
        self._offset += len(whole) + len(newline)
        lines = (whole + newline).splitlines(keepends=True)
        return [row for line in lines if (row := _parse(line)) is not None], restarted


@dataclass
class _Stage:
    name: str
    folder: Path
    pending: list[str]
    """Evaluations whose result has not been shown."""
    seconds: dict[str, float]
    """How long each evaluation took, of any stage; shared by all."""
    finished: bool = False
    plan: StagePlan | None = None
    """stage.json, once it exists."""
    part_since: float | None = None
    """When training or the last evaluation was seen to end."""
    tail: _Tail = field(init=False)

    def __post_init__(self) -> None:
        self.tail = _Tail(StageFolder(self.folder).metrics)

    def newest_checkpoint(self) -> int:
        """Its step; 0 without one."""
        steps = (path.parent.name.removeprefix("step-") for path in self.folder.glob("step-*/MANIFEST.json"))
        return max((int(step) for step in steps if step.isdigit()), default=0)

    def evaluated(self, name: str) -> None:
        """Note the end of an evaluation, and how long it took if its start was seen."""
        now = time.monotonic()
        self.pending.remove(name)
        if self.part_since is not None:
            self.seconds[name] = now - self.part_since
        self.part_since = now

    def time_left(self, training_s: float) -> str:
        """The time for the rest of the stage, evaluations included once each of them was measured in another one."""
        if any(name not in self.seconds for name in self.pending):
            return f"{timedelta(seconds=round(training_s))} of training left"
        evaluation_s = sum(self.seconds[name] for name in self.pending)
        return f"{timedelta(seconds=round(training_s + evaluation_s))} left"


class _Lines:
    """One plain line per event, for logs."""

    def __init__(self, stream: TextIO, every_s: float) -> None:
        self.stream = stream
        self.every_s = every_s
        self._printed_at: dict[str, float] = {}
        self._evaluated: dict[str, tuple[str, int]] = {}

    def print_line(self, text: str) -> None:
        print(printable(text), file=self.stream, flush=True)

    def train(self, name: str, row: MetricRow, plan: StagePlan, facts: list[str]) -> None:
        now = time.monotonic()
        if now - self._printed_at.get(name, float("-inf")) >= self.every_s:
            self._printed_at[name] = now
            step, total = row.step, plan.total_steps
            self.print_line(f"{name}  step {step}/{total} ({100 * step // total} %)  {'  '.join(facts)}")

    def evaluate(self, name: str, label: str, done: int, total: int) -> None:
        now = time.monotonic()
        if self._evaluated.get(name) == (label, done):  # a chunk may take minutes
            return
        if now - self._printed_at.get(name, float("-inf")) >= self.every_s:
            self._printed_at[name] = now
            self._evaluated[name] = label, done
            self.print_line(f"{name}  {label}: {done:,}/{total:,} test images")

    def end(self, name: str) -> None:
        self._printed_at.pop(name, None)

    def close(self) -> None:
        self.stream.flush()


class _Bars:
    """One bar per active stage, results above them, for terminals."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self._bars: dict[str, tqdm[Any]] = {}

    def print_line(self, text: str) -> None:
        tqdm.write(printable(text), file=self.stream)

    def train(self, name: str, row: MetricRow, plan: StagePlan, facts: list[str]) -> None:
        self._move(name, name, row.step, plan.total_steps, ", ".join(facts))

    def evaluate(self, name: str, label: str, done: int, total: int) -> None:
        self._move(name, f"{name} {label}", done, total, "")

    def end(self, name: str) -> None:
        bar = self._bars.pop(name, None)
        if bar is not None:
            bar.close()

    def close(self) -> None:
        for name in list(self._bars):
            self.end(name)

    def _move(self, name: str, label: str, done: int, total: int, facts: str) -> None:
        bar = self._bars.get(name)
        if bar is None:
            bar = tqdm(total=total, file=self.stream, leave=False, dynamic_ncols=True, bar_format=BAR)
            self._bars[name] = bar
        bar.total, bar.n = total, done  # set, not incremented: a resumed stage goes back
        bar.set_description_str(label, refresh=False)
        bar.set_postfix_str(facts, refresh=False)
        bar.refresh()


def _update(stage: _Stage, view: _Lines | _Bars) -> None:
    """Show what has changed in one stage since the last update."""
    if not stage.finished:
        _update_training(stage, view)
    else:
        progress = _read_if_whole(StageFolder(stage.folder).evaluation_progress, EvaluationProgress.read)
        for name in list(stage.pending):
            evaluation = _read_if_whole(StageFolder(stage.folder).evaluation(name), EvaluationResult.read)
            if evaluation is not None:
                stage.evaluated(name)
                view.end(stage.name)
                view.print_line(f"{stage.name}  {_accuracies_with_intervals(evaluation)}")
        if progress is not None and progress.attack in (HONESTY, *stage.pending):
            view.evaluate(stage.name, progress.attack, progress.done, progress.total)


def _update_training(stage: _Stage, view: _Lines | _Bars) -> None:
    if stage.plan is None:
        stage.plan = _read_if_whole(StageFolder(stage.folder).plan, StagePlan.read)
        if stage.plan is None:
            return
        steps, batch = stage.plan.total_steps, stage.plan.batch_per_step
        start = f", from step {step:,}" if (step := stage.newest_checkpoint()) else ""
        plan = f"{steps:,} steps of {batch:,} images{start}"
        if stage.plan.trials:
            plan = f"chooses from {stage.plan.trials} trials"
        elif stage.plan.weights is not None:
            plan = f"takes the weights of {stage.plan.weights}"
        view.print_line(f"{stage.name}  {plan}")
    # Before the rows, so that none of them is missed.
    result = _read_if_whole(StageFolder(stage.folder).result, StageResult.read)
    rows, restarted = ([], False) if stage.plan.trials else stage.tail.read()  # a trial's rows were shown
    if restarted:
        view.print_line(f"{stage.name}  resumed, at step {rows[-1].step if rows else 0}")
    else:
        for row in rows:
            if row.kind == "validation":
                view.print_line(f"{stage.name}  step {row.step}  held-out images: {_accuracies(row)}")
    train = [row for row in rows if row.kind == "train"]
    if train:
        view.train(stage.name, train[-1], stage.plan, _facts(train[-1], stage))
    if result is not None:
        stage.finished, stage.part_since = True, time.monotonic()
        view.end(stage.name)
        next_part = f"; now evaluated: {', '.join(stage.pending)}" if stage.pending else ""
        steps = result.steps or stage.plan.total_steps
        end = f"finished after {steps:,} steps" if steps else "finished"
        end = f"chosen: {result.chosen.text}" if result.chosen else end
        view.print_line(f"{stage.name}  {end}{next_part}")
        _update(stage, view)


def _facts(row: MetricRow, stage: _Stage) -> list[str]:
    """Loss, robust accuracy, images/s and the time left at this speed."""
    assert stage.plan is not None
    facts = [] if row.loss is None else [f"loss {row.loss:.3g}"]
    if row.robust_accuracy is not None:
        facts.append(f"robust {100 * row.robust_accuracy:.1f} %")
    speed = row.timing.images_per_s or 0.0
    facts.append(f"{speed:,.0f} images/s")
    if speed > 0:
        images = (stage.plan.total_steps - row.step) * stage.plan.batch_per_step
        facts.append(stage.time_left(images / speed))
    return facts


def _accuracies(row: MetricRow) -> str:
    pairs = (("clean", row.clean_accuracy), ("robust", row.robust_accuracy))
    return ", ".join(f"{name} {100 * value:.1f} %" for name, value in pairs if value is not None)


def _accuracies_with_intervals(evaluation: EvaluationResult) -> str:
    parts = []
    for kind in KINDS:
        value, low, high = (100 * share for share in evaluation.accuracy(kind).to_json().values())
        parts.append(f"{kind} {value:.2f} % [{low:.2f}, {high:.2f}]")
    return f"{', '.join(parts)} on {evaluation.images:,} test images: {evaluation.title}"


def _parse(line: bytes) -> MetricRow | None:
    """A metrics row; None for a damaged line, which the next resume removes."""
    try:
        return MetricRow.parse(parse_row(line))
    except ValueError:
        return None


def _read_if_whole(path: Path, read: Callable[[Path], Value]) -> Value | None:
    """`read(path)`; None if the file does not exist (yet) or cannot be read at this moment."""
    try:
        return read(path)
    except (OSError, ValueError):
        return None
