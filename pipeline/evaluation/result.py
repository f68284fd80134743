"""Result files of evaluations, `evaluate/*.json` and `honesty.json`, as immutable records. Imports no torch."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import AliasChoices, Field, model_validator

from pipeline.run.records import Count, Record, Share

Kind = Literal["clean", "robust"]
KINDS: tuple[Kind, ...] = ("clean", "robust")


Result = TypeVar("Result", bound="EvaluationHeader")


class Accuracy(Record):
    """A share of images and its 95 % Wilson interval."""

    value: Share
    low: Share
    high: Share


class EvaluationHeader(Record):
    """Everything that determines the verdicts of an evaluation."""

    FIX: ClassVar[str] = "delete it and evaluate again"

    attack: Annotated[str, Field(pattern=r"^[A-Za-z0-9][\w+.-]*$")]
    title: str
    settings: dict[str, Any]
    """The measure's settings, norm and eps among them."""
    chunk: Count
    model_sha256: str
    data_sha256: str
    preprocessing: str | None = None
    """Only for image files read by a list, like image_list_sha256."""
    image_list_sha256: str | None = None
    images: Count

    def read_if_current(self, path: Path, kind: type[Result]) -> Result | None:
        """The record in a file if its header equals this one, else None; also None for a damaged file."""
        try:
            result = kind.read(path)
        except ValueError:
            return None
        return result if all(getattr(result, name) == value for name, value in self) else None


class CheckSummary(Record):
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


class HonestySummary(Record):
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

    clean_correct: Count
    clean_accuracy: Accuracy
    clean_top5_correct: Count | None = None
    clean_top5_accuracy: Accuracy | None = None
    robust_correct: Count
    robust_accuracy: Accuracy
    robust_top5_correct: Count | None = None
    robust_top5_accuracy: Accuracy | None = None
    broken_by: dict[str, Count] | None = None
    """Attack of an ensemble -> number of images that it breaks first."""
    flags: dict[str, Count] | None = None
    """AutoAttack's warning -> number of images in chunks that raise it."""
    corruption_accuracy: dict[str, list[Share]] | None = None
    """Corruption -> accuracy at severities 1 to 5."""
    severity_accuracy: list[Share] | None = None
    mean_corruption_accuracy: Share | None = None
    mean_certified_radius: float | None = None
    abstained: Count | None = None
    honesty: HonestySummary | None = None

    @model_validator(mode="after")
    def _counts_are_shares(self) -> EvaluationResult:
        for name in ("clean", "clean_top5", "robust", "robust_top5"):
            correct, accuracy = getattr(self, f"{name}_correct"), getattr(self, f"{name}_accuracy")
            if correct is None and accuracy is None:
                continue
            if correct is None or accuracy is None or not _agree(accuracy, correct, self.images):
                raise ValueError(f"{name}_accuracy is not that of {correct} of {self.images} images")
        return self

    def correct(self, kind: Kind) -> int:
        return self.clean_correct if kind == "clean" else self.robust_correct

    def accuracy(self, kind: Kind) -> Accuracy:
        return self.clean_accuracy if kind == "clean" else self.robust_accuracy


def _agree(accuracy: Accuracy, correct: int, images: int) -> bool:
    return (
        0 <= correct <= images != 0
        and math.isclose(accuracy.value, correct / images, abs_tol=1e-6)
        and accuracy.low <= accuracy.value <= accuracy.high
    )
