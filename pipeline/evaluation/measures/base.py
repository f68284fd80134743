"""What a measure of robustness is: it gives one verdict per image, and verdicts give counts and intervals."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pipeline.evaluation.statistics import wilson_interval

Verdicts = dict[str, NDArray[Any]]
"""Columns of equal length, one row per image: sample_id, label, clean_correct, robust_correct and a measure's own."""


class Measure(Protocol):
    """One way to evaluate, with everything that decides its verdicts but the network and the images."""

    @property
    def name(self) -> str:
        """What its files are called: evaluate/<name>.json."""
        ...

    @property
    def settings(self) -> dict[str, Any]:
        """Plain values; verdicts of different settings do not stand in one table. norm and eps are among them."""
        ...

    @property
    def title(self) -> str:
        """The settings, for people."""
        ...

    def verdicts(self, network: nn.Module, x: Tensor, y: Tensor, ids: NDArray[np.int64]) -> dict[str, Tensor]:
        """Columns for images x [n, ...] float32 in [0, 1] of classes y [n] int64; noise is keyed by ids [n].

        The network is in eval mode. Bool columns clean_correct and robust_correct are always there.
        """
        ...


def ranked(logits: Tensor) -> Tensor:
    """Classes by falling logit, int64 [n, classes]. Ties go by class order, so a constant network is not right."""
    return torch.sort(logits, dim=1, descending=True, stable=True).indices


def hits(classes: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """(top-1 correct, top-5 correct), bool [n], of `ranked` classes."""
    right = classes[:, :5] == labels[:, None]
    return right[:, 0], right.any(dim=1)


def summarise(verdicts: Verdicts) -> dict[str, Any]:
    """Exact counts and 95 % Wilson intervals for result files."""
    total = len(verdicts["sample_id"])
    summary: dict[str, Any] = {"images": total}
    for column in ("clean_correct", "clean_top5", "robust_correct", "robust_top5"):
        if column in verdicts:
            name = column.removesuffix("_correct")
            correct = int(verdicts[column].sum())
            low, high = wilson_interval(correct, total)
            summary[f"{name}_correct"] = correct
            summary[f"{name}_accuracy"] = {"value": correct / total, "low": low, "high": high}
    for prefix, key in (("broken_", "broken_by"), ("flag_", "flags")):  # attack -> images; warning -> images
        found = [name for name in verdicts if name.startswith(prefix)]
        if found:
            summary[key] = {name.removeprefix(prefix): int(verdicts[name].sum()) for name in found}
    corrupted = [name for name in verdicts if name.startswith(("right_", "extra_"))]
    if corrupted:
        accuracies: dict[str, list[float]] = {}
        for name in corrupted:  # by corruption, in the order of severities
            corruption = name.partition("_")[2].rpartition("_")[0]
            accuracies.setdefault(corruption, []).append(float(verdicts[name].mean()))
        counted = [accuracies[corruption] for corruption in accuracies if f"right_{corruption}_1" in verdicts]
        summary["corruption_accuracy"] = accuracies
        summary["severity_accuracy"] = np.mean(counted, axis=0).tolist()
        summary["mean_corruption_accuracy"] = float(np.mean(counted))
    if "radius" in verdicts:
        # Over all images; one that is not right counts as 0 (Zhai et al., ICLR 2020, "ACR").
        summary["mean_certified_radius"] = float((verdicts["radius"] * verdicts["clean_correct"]).mean())
        summary["abstained"] = int((verdicts["clean_prediction"] < 0).sum())
    return summary
