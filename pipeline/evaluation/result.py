"""Result files of evaluations, `evaluate/*.json` and `honesty.json`, as immutable records. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self, TypeVar

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError

from pipeline.run.files import read_json

Kind = Literal["clean", "robust"]
KINDS: tuple[Kind, ...] = ("clean", "robust")


Result = TypeVar("Result", bound="EvaluationHeader")


class _Record(BaseModel):
    """Unknown keys are ignored; fields that are None are omitted from the file."""

    model_config = ConfigDict(frozen=True)

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
            raise ValueError(f"{path} is damaged: {error}; delete it and evaluate again") from None


class Accuracy(_Record):
    """A share of images and its 95 % Wilson interval."""

    value: float
    low: float
    high: float


class EvaluationHeader(_Record):
    """Everything that determines the verdicts of an evaluation."""

    attack: str
    title: str
    settings: dict[str, Any]
    """The measure's settings, norm and eps among them."""
    chunk: int
    model_sha256: str
    data_sha256: str
    preprocessing: str | None = None
    """Only for image files read by a list, like image_list_sha256."""
    image_list_sha256: str | None = None
    images: int

    def read_if_current(self, path: Path, kind: type[Result]) -> Result | None:
        """The record in a file if its header equals this one, else None; also None for a damaged file."""
        try:
            result = kind.read(path)
        except ValueError:
            return None
        return result if all(getattr(result, name) == value for name, value in self) else None


class CheckSummary(_Record):
    """One honesty check without its explanation."""

    name: str
    status: Literal["pass", "warn"] = Field(
        validation_alias=AliasChoices("verdict", "status"), serialization_alias="verdict"
    )
    figure: str
    """The measured statistic, in words."""


class Check(CheckSummary):
    """One honesty check as in honesty.json."""

    meaning: str
    """What a warning means, and the remedy."""


class HonestySummary(_Record):
    """The honesty checks of the network that was evaluated."""

    images: int
    checks: tuple[CheckSummary, ...]


class HonestyResult(EvaluationHeader):
    """Contents of `honesty.json`."""

    checks: tuple[Check, ...]

    def summary(self) -> HonestySummary:
        checks = [CheckSummary(name=c.name, status=c.status, figure=c.figure) for c in self.checks]
        return HonestySummary(images=self.images, checks=tuple(checks))


class EvaluationResult(EvaluationHeader):
    """Contents of `evaluate/<name>.json`: counts of images, and accuracies as fractions."""

    clean_correct: int
    clean_accuracy: Accuracy
    clean_top5_correct: int | None = None
    clean_top5_accuracy: Accuracy | None = None
    robust_correct: int
    robust_accuracy: Accuracy
    robust_top5_correct: int | None = None
    robust_top5_accuracy: Accuracy | None = None
    broken_by: dict[str, int] | None = None
    """Attack of an ensemble -> number of images that it breaks first."""
    flags: dict[str, int] | None = None
    """AutoAttack's warning -> number of images in chunks that raise it."""
    corruption_accuracy: dict[str, list[float]] | None = None
    """Corruption -> accuracy at severities 1 to 5."""
    severity_accuracy: list[float] | None = None
    mean_corruption_accuracy: float | None = None
    mean_certified_radius: float | None = None
    abstained: int | None = None
    honesty: HonestySummary | None = None

    def correct(self, kind: Kind) -> int:
        return self.clean_correct if kind == "clean" else self.robust_correct

    def accuracy(self, kind: Kind) -> Accuracy:
        return self.clean_accuracy if kind == "clean" else self.robust_accuracy
