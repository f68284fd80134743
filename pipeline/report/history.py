"""What a run's stages left beside their accuracies: metric rows, parents, time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pipeline.recipe.objective import Objective
from pipeline.recipe.stages import Stage, stages_of
from pipeline.recipe.technique import OneStep
from pipeline.report.results import RunResult
from pipeline.robustness.overfitting import stronger
from pipeline.run.files import read_json_if_there, read_rows
from pipeline.run.layout import StageFolder
from pipeline.run.tracking.metrics import PARTS


@dataclass(frozen=True)
class History:
    """One stage that has begun."""

    stage: Stage
    rows: list[dict[str, Any]]
    """Of metrics.jsonl, in order."""
    described: dict[str, Any]
    """stage.json."""
    result: dict[str, Any] | None
    """result.json; None while the stage is unfinished."""

    def of_kind(self, kind: str) -> list[dict[str, Any]]:
        return [row for row in self.rows if row.get("kind") == kind]


@dataclass(frozen=True)
class Spent:
    """What a stage cost, told from the rows of its finished steps: what a restart repeated is not among them."""

    steps: int
    epochs: float
    pass_epochs: float | None
    """Forward and backward passes over the training images; None for objectives that propagate bounds instead."""
    train_s: float
    held_out_s: float
    seconds_in: dict[str, float]
    """What of train_s was spent in each of `stopwatch.PARTS`; zeros for rows that do not tell them apart."""
    images: int

    @property
    def seconds(self) -> float:
        return self.train_s + self.held_out_s


def read_history(run: RunResult) -> list[History]:
    """The stages that have begun, in the recipe's order. Errors: ValueError naming a damaged file."""
    found = []
    for stage in stages_of(run.recipe):
        folder = run.folder / stage.name
        described, rows = read_json_if_there(StageFolder(folder).plan), read_rows(StageFolder(folder).metrics)
        result = read_json_if_there(StageFolder(folder).result)
        if described or rows or result:
            found.append(History(stage, rows, described or {}, result))
    return found


def passes_per_step(objective: Objective, level: int = 0) -> int | None:
    """The objective's own; from `level` 1 on, one-step training is PGD (see `pipeline.robustness.overfitting`)."""
    if level > 0 and isinstance(objective, OneStep):
        return stronger(level, 1.0, 1.0)[0] + 1
    return objective.passes_per_step


def spent(history: History) -> Spent:
    """What a stage has cost so far."""
    trained, validated = history.of_kind("train"), history.of_kind("validation")
    objective, per_epoch = history.stage.objective, history.described.get("steps_per_epoch")
    images = sum(row["images"] for row in trained)
    passes: float | None = 0.0
    for row in trained:
        each = passes_per_step(objective, row.get("attack_level", 0))
        passes = None if passes is None or each is None else passes + each * row["images"]
    in_epoch = (per_epoch or 0) * history.described.get("batch_per_step", 0) / objective.steps_per_batch
    return Spent(
        steps=trained[-1]["step"] if trained else 0,
        epochs=trained[-1]["epoch"] if trained else 0.0,
        pass_epochs=passes / in_epoch if passes is not None and in_epoch else None,
        train_s=sum(row["timing"]["seconds"] for row in trained),
        held_out_s=sum(row["timing"]["seconds"] for row in validated),
        seconds_in={part: sum(row["timing"].get("seconds_in", {}).get(part, 0.0) for row in trained) for part in PARTS},
        images=images,
    )
