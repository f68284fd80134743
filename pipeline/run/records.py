"""What the JSON files of a run hold, as typed records: a file of another type is one error that names it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from pipeline.run.files import read_json, read_rows

Count = Annotated[int, Field(ge=0, lt=2**63)]
Share = Annotated[float, Field(ge=0, le=1)]
Seconds = Annotated[float, Field(ge=0)]
Rate = Annotated[float, Field(gt=0)]
"""A learning rate."""


class Record(BaseModel):
    """A JSON object. Unknown keys are ignored; fields that are None are omitted from the file."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)
    FIX: ClassVar[str] = "restore it"

    def to_json(self) -> dict[str, Any]:
        values = self.model_dump(by_alias=True)
        return {name: value for name, value in values.items() if value is not None}

    @classmethod
    def parse(cls, value: Any) -> Self:
        """Parse a JSON value. Errors: ValueError naming every invalid field."""
        try:
            return cls.model_validate(value)
        except ValidationError as error:
            problems = [f"{'.'.join(map(str, each['loc'])) or 'value'}: {each['msg']}" for each in error.errors()]
            raise ValueError("; ".join(problems)) from None

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a record. Errors: ValueError naming the file if it is missing, damaged or no such record."""
        value = read_json(path)
        try:
            return cls.parse(value)
        except ValueError as error:
            raise ValueError(f"{path} is damaged: {error}; {cls.FIX}") from None

    @classmethod
    def read_if_there(cls, path: Path) -> Self | None:
        """`read`, or None if the file does not exist."""
        return cls.read(path) if path.exists() else None


class StagePlan(Record):
    """stage.json."""

    total_steps: Count
    steps_per_epoch: Count | None = None
    batch_per_step: Count = 0
    trials: Count = 0
    """Number of trials that it chooses from, for a stage that trains nothing."""
    weights: str | None = None
    """Whose weights it takes, for another stage that trains nothing."""


class KeptCount(Record):
    """Kept connections of one layer."""

    name: Annotated[str, Field(pattern=r"^[^\x00-\x1f\x7f]+$")]
    kept: Count
    total: Annotated[int, Field(gt=0, lt=2**63)]

    @model_validator(mode="after")
    def _no_more_than_all(self) -> KeptCount:
        if self.kept > self.total:
            raise ValueError(f"{self.kept} of {self.total} connections cannot be kept")
        return self


class TrialResult(Record):
    """One of the trials that a stage has chosen from."""

    stage: str
    """Its last stage."""
    finetune_lr: Rate
    prune_lr: Rate | None = None
    """Absent for methods without a prune phase."""
    held_out_robust_accuracy: Share
    chosen: bool

    @property
    def rates(self) -> str:
        """finetune lr 0.03, prune lr 0.1"""
        prune = "" if self.prune_lr is None else f", prune lr {self.prune_lr:g}"
        return f"finetune lr {self.finetune_lr:g}{prune}"

    @property
    def text(self) -> str:
        return f"{self.rates} ({100 * self.held_out_robust_accuracy:.1f} % robust on the held-out images)"


class StageResult(Record):
    """result.json, which commits a stage."""

    FIX: ClassVar[str] = "restore it, or delete it and resume the run"

    model_sha256: str
    mask_sha256: str | None = None
    steps: Count | None = None
    selected_step: Count | None = None
    layers: tuple[KeptCount, ...] = ()
    held_out_robust_accuracy: Share | None = None
    """Of the trial of a method, on the held-out images at `selected_step`."""
    tuned: tuple[TrialResult, ...] = ()
    """The trials that this stage has chosen from; empty for a stage that was trained."""

    @property
    def chosen(self) -> TrialResult | None:
        return next((trial for trial in self.tuned if trial.chosen), None)

    @model_validator(mode="after")
    def _one_is_chosen(self) -> StageResult:
        if self.tuned and sum(trial.chosen for trial in self.tuned) != 1:
            raise ValueError(f"of {len(self.tuned)} tuned trials, {sum(t.chosen for t in self.tuned)} are chosen")
        return self


class Provenance(Record):
    """provenance.json; what is not there was not recorded by the version that began the run."""

    commit: str | None = None
    created: str | None = None
    machine: str | None = None
    processor: str | None = None
    cores: Count | None = None
    gpus: tuple[str, ...] | None = None
    python: str | None = None
    recipe_sha256: str | None = None
    data_sha256: dict[str, str] | None = None
    versions: dict[str, str] | None = None


class EvaluationProgress(Record):
    """evaluate/progress.json: images done under an attack."""

    attack: str
    done: Count
    total: Count


class Timing(Record):
    """Wall-clock time of the steps of a row."""

    seconds: Seconds
    images_per_s: Seconds | None = None
    seconds_in: dict[str, Seconds] = {}


class MetricRow(Record):
    """One row of metrics.jsonl, as far as it is read again."""

    kind: Literal["train", "validation"]
    step: Count
    epoch: float = 0.0
    images: Count = 0
    timing: Timing
    loss: float | None = None
    lr: float | None = None
    clean_accuracy: Share | None = None
    robust_accuracy: Share | None = None
    attack_level: Count = 0


def read_metric_rows(path: Path) -> list[MetricRow]:
    """The rows of a stage, in order; damaged ones are skipped, as a resume removes them. Errors: as `read_rows`."""
    rows = []
    for row in read_rows(path):
        try:
            rows.append(MetricRow.parse(row))
        except ValueError:
            continue
    return rows
