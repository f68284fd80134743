"""A run's training history: metrics, parents and compute of its stages."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.recipe.objective import Objective
from pipeline.recipe.stages import Stage, stages_of
from pipeline.recipe.technique import OneStep
from pipeline.report.results import RunResult
from pipeline.robustness.overfitting import stronger
from pipeline.run.layout import StageFolder
from pipeline.run.records import MetricRow, StagePlan, StageResult, read_metric_rows
from pipeline.run.tracking.metrics import PARTS


@dataclass(frozen=True)
class History:
    """One stage that has started."""

    stage: Stage
    rows: list[MetricRow]
    """Rows of metrics.jsonl, in order."""
    plan: StagePlan | None
    """stage.json."""
    result: StageResult | None
    """result.json; None while the stage is unfinished."""

    def of_kind(self, kind: str) -> list[MetricRow]:
        return [row for row in self.rows if row.kind == kind]


@dataclass(frozen=True)
class StageCost:
    """Compute cost of a stage from the metrics of its finished steps; steps repeated after a restart count once."""

    steps: int
    epochs: float
    pass_epochs: float | None
    """Number of forward-backward passes over the training images; None for objectives that propagate bounds instead."""
    train_s: float
    held_out_s: float
    seconds_in: dict[str, float]
    """train_s by part (`tracking.metrics.PARTS`); zero for rows without this breakdown."""
    images: int

    @property
    def seconds(self) -> float:
        return self.train_s + self.held_out_s


def read_history(run: RunResult) -> list[History]:
    """Histories of the stages that have started, in the recipe's order. Errors: ValueError naming a damaged file."""
    histories = []
    for stage in stages_of(run.recipe):
        folder = run.folder / stage.name
        files = StageFolder(folder)
        plan, rows = StagePlan.read_if_there(files.plan), read_metric_rows(files.metrics)
        result = StageResult.read_if_there(files.result)
        if plan or rows or result:
            histories.append(History(stage, rows, plan, result))
    return histories


def without_rejected_trials(histories: list[History]) -> list[History]:
    """Of a method that has chosen a trial, the stages of that trial alone; and of all others, all."""
    by_name = {history.stage.name: history for history in histories}
    rejected: set[str | None] = set()
    for history in histories:
        if (trial := history.result and history.result.chosen) is not None:
            trials = [by_name[name] for name in history.stage.sources if name in by_name]
            kept = {each.stage.starts_from for each in trials if each.stage.name == trial.stage}
            rejected |= {
                each.stage.name for each in trials
            }  # the chosen one's rows are those of the stage that chose it
            rejected |= {each.stage.starts_from for each in trials} - kept
    return [history for history in histories if history.stage.name not in rejected]


def passes_per_step(objective: Objective, level: int = 0) -> int | None:
    """Forward-backward passes per training step; from `level` 1 on, one-step training uses PGD (see
    `pipeline.robustness.overfitting`)."""
    if level > 0 and isinstance(objective, OneStep):
        return stronger(level, 1.0, 1.0)[0] + 1
    return objective.passes_per_step


def stage_cost(history: History) -> StageCost:
    """Compute cost of a stage so far."""
    train_rows, held_out_rows = history.of_kind("train"), history.of_kind("validation")
    objective, plan = history.stage.objective, history.plan
    images = sum(row.images for row in train_rows)
    passes: float | None = 0.0
    for row in train_rows:
        each = passes_per_step(objective, row.attack_level)
        passes = None if passes is None or each is None else passes + (each + history.stage.extra_passes) * row.images
    in_epoch = (plan.steps_per_epoch or 0) * plan.batch_per_step / objective.steps_per_batch if plan else 0
    return StageCost(
        steps=train_rows[-1].step if train_rows else 0,
        epochs=train_rows[-1].epoch if train_rows else 0.0,
        pass_epochs=passes / in_epoch if passes is not None and in_epoch else None,
        train_s=sum(row.timing.seconds for row in train_rows),
        held_out_s=sum(row.timing.seconds for row in held_out_rows),
        seconds_in={part: sum(row.timing.seconds_in.get(part, 0.0) for row in train_rows) for part in PARTS},
        images=images,
    )
