"""Accuracy per class, confusion matrices, and the accuracy of always answering the most frequent class.

Verdicts hold the predictions of clean images; under attack they say only whether an image stays correct.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.data.manifest import DataError, read_manifest
from pipeline.evaluation.chunks import read_verdicts
from pipeline.evaluation.result import KINDS, Kind
from pipeline.report.results import NetworkResult, RunResult, claim
from pipeline.run.layout import StageFolder

COLUMNS = ("sample_id", "label", "clean_prediction", "clean_correct", "robust_correct")
ABSTAINED = "(abstained)"
"""The prediction where a smoothed network gives none."""


@dataclass(frozen=True)
class LabelledVerdicts:
    """The verdicts of a network's own evaluation, arrays [n] by image."""

    ids: NDArray[np.int64]
    labels: NDArray[np.int64]
    predictions: NDArray[np.int64]
    """Of the clean images; -1 where a smoothed network abstains."""
    clean_correct: NDArray[np.bool_]
    robust_correct: NDArray[np.bool_]

    def per_class(self, num_classes: int) -> NDArray[np.int64]:
        """[3, num_classes]: images of each class, those that are correct clean, and those that are robust."""
        of = (self.labels, self.labels[self.clean_correct], self.labels[self.robust_correct])
        return np.stack([np.bincount(labels, minlength=num_classes) for labels in of])

    def confusion(self, num_classes: int) -> NDArray[np.int64]:
        """[num_classes, num_classes + 1]: images of class i that are predicted as class j; the last column counts
        abstentions."""
        width = num_classes + 1
        predicted = np.where(self.predictions < 0, num_classes, self.predictions)
        return np.bincount(self.labels * width + predicted, minlength=num_classes * width).reshape(num_classes, width)


@dataclass(frozen=True)
class MajorityClass:
    """The most frequent class of the evaluated images."""

    name: str
    share: float
    """Fraction of the images: the accuracy, clean and robust, of always answering this class."""


@dataclass(frozen=True)
class ClassResults:
    """The verdicts of all evaluated networks of comparable runs, which are on the same images."""

    class_names: list[str]
    networks: list[tuple[RunResult, NetworkResult, LabelledVerdicts]]
    """By run, in the recipe's order."""

    @cached_property
    def majority(self) -> MajorityClass | None:
        """None until a network is evaluated."""
        if not self.networks:
            return None
        images = self.networks[0][2].per_class(len(self.class_names))[0]
        return MajorityClass(self.class_names[int(images.argmax())], float(images.max() / images.sum()))

    def of(self, name: str, keep: Decimal) -> list[LabelledVerdicts]:
        """Of one network in every run in which it is evaluated."""
        return [v for _, network, v in self.networks if (network.name, network.keep_fraction) == (name, keep)]


def read_class_results(runs: Sequence[RunResult]) -> ClassResults:
    """Errors: ValueError naming verdicts of classes that the recipe does not have."""
    networks = []
    for run in runs:
        for network in run.networks:
            if (verdicts := read_labelled_verdicts(network, run.recipe.model.num_classes)) is not None:
                networks.append((run, network, verdicts))
    return ClassResults(_class_names(runs[0]), networks)


def read_labelled_verdicts(network: NetworkResult, num_classes: int) -> LabelledVerdicts | None:
    """The verdicts of a network's own evaluation; None until it is evaluated, and if they lack a column.

    Errors: ValueError naming the file if a label or prediction is not one of the `num_classes` classes.
    """
    if network.evaluation is None:
        return None
    path = StageFolder(network.folder).evaluation(network.evaluation.attack).with_suffix(".parquet")
    columns = read_verdicts(path)
    if not columns.keys() >= set(COLUMNS):
        return None
    verdicts = LabelledVerdicts(*(columns[name] for name in COLUMNS))
    for column, lowest in ((verdicts.labels, 0), (verdicts.predictions, -1)):
        if len(column) and not lowest <= column.min() <= column.max() < num_classes:
            raise ValueError(
                f"{path} has class {column.min() if column.min() < lowest else column.max()}, but the recipe has "
                f"{num_classes} classes; delete it and the .json beside it, and resume the run to evaluate again"
            )
    return verdicts


def _class_names(run: RunResult) -> list[str]:
    """By label: of the test file's manifest if that is the file that was evaluated, else "class 0" and so on."""
    num_classes = run.recipe.model.num_classes
    evaluated = {network.evaluation.data_sha256 for network in run.networks if network.evaluation is not None}
    try:
        manifest = read_manifest(Path(run.recipe.data.test_file))
    except DataError:
        manifest = None
    if manifest is not None and evaluated <= {manifest.sha256} and manifest.num_classes == num_classes:
        return manifest.class_names
    return [f"class {label}" for label in range(num_classes)]


def useless_networks(runs: Sequence[RunResult], majority: MajorityClass | None) -> list[str]:
    """One warning per network whose clean or robust accuracy is not above the majority class's share, by its 95 %
    interval."""
    warnings: list[str] = []
    if majority is None:
        return warnings
    for run in runs:
        for network in run.networks:
            evaluation = network.evaluation
            kinds: list[Kind] = [
                kind for kind in KINDS if evaluation and evaluation.accuracy(kind).low <= majority.share
            ]
            if evaluation is not None and kinds:
                words: dict[Kind, str] = {"clean": "clean", "robust": claim([run])}
                values = " and ".join(f"{words[k]} accuracy {100 * evaluation.accuracy(k).value:.2f} %" for k in kinds)
                where = "" if len(runs) == 1 else f", {run.folder.name}"
                warnings.append(
                    f"{network.label}{where}: {values}, not above the {100 * majority.share:.2f} % of always answering "
                    f"{majority.name!r}"
                )
    return warnings


def per_class_rows(results: ClassResults) -> list[dict[str, Any]]:
    """One row per network and class: images, and how many of them are classified correctly."""
    rows = []
    for run, network, verdicts in results.networks:
        counts = verdicts.per_class(len(results.class_names)).T.tolist()
        for label, (images, clean, robust) in enumerate(counts):
            row = _labels(run, network) | {"label": label, "class": results.class_names[label], "images": images}
            for kind, correct in (("clean", clean), ("robust", robust)):
                row |= {f"{kind}_correct": correct, f"{kind}_accuracy": correct / images if images else None}
            rows.append(row)
    return rows


def confusion_rows(results: ClassResults) -> list[dict[str, Any]]:
    """One row per network and pair (true class, predicted class) that occurs among the clean images."""
    rows, names = [], [*results.class_names, ABSTAINED]
    for run, network, verdicts in results.networks:
        confusion = verdicts.confusion(len(results.class_names))
        for true, predicted in np.argwhere(confusion).tolist():
            pair = {"true_class": names[true], "predicted_class": names[predicted]}
            rows.append(_labels(run, network) | pair | {"images": int(confusion[true, predicted])})
    return rows


def _labels(run: RunResult, network: NetworkResult) -> dict[str, Any]:
    labels: dict[str, Any] = {"run": run.folder.name, "seed": run.recipe.seed, "network": network.name}
    return labels | {"keep_fraction": network.keep_fraction}
