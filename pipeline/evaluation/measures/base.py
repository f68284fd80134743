"""The interface of measures, one verdict per image, and the summary of verdicts as counts and intervals."""

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
    """One way to evaluate robustness; with the network and the images, it determines the verdicts."""

    @property
    def name(self) -> str:
        """Stem of its result files: evaluate/<name>.json."""
        ...

    @property
    def settings(self) -> dict[str, Any]:
        """JSON values, norm and eps among them; accuracies under different settings are not compared."""
        ...

    @property
    def title(self) -> str:
        """Human-readable settings."""
        ...

    def verdicts(self, network: nn.Module, x: Tensor, y: Tensor, ids: NDArray[np.int64]) -> dict[str, Tensor]:
        """Columns for images x [n, ...] float32 in [0, 1] of classes y [n] int64; noise is keyed by ids [n].

        The network is in eval mode. Bool columns clean_correct and robust_correct are always there.
        """
        ...


def ranked(logits: Tensor) -> Tensor:
    """Classes by decreasing logit, int64 [n, classes]. Ties go by class order, so constant logits score at chance."""
    return torch.sort(logits, dim=1, descending=True, stable=True).indices


def hits(classes: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """(top-1 correct, top-5 correct), bool [n], of `ranked` classes."""
    is_label = classes[:, :5] == labels[:, None]
    return is_label[:, 0], is_label.any(dim=1)


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
    for prefix, key in (("broken_", "broken_by"), ("flag_", "flags")):  # attack or warning -> number of images
        names = [name for name in verdicts if name.startswith(prefix)]
        if names:
            summary[key] = {name.removeprefix(prefix): int(verdicts[name].sum()) for name in names}
    corruption_columns = [name for name in verdicts if name.startswith(("right_", "extra_"))]
    if corruption_columns:
        accuracies: dict[str, list[float]] = {}
        for name in corruption_columns:  # ordered by severity
            corruption = name.partition("_")[2].rpartition("_")[0]
            accuracies.setdefault(corruption, []).append(float(verdicts[name].mean()))
        counted = [accuracies[corruption] for corruption in accuracies if f"right_{corruption}_1" in verdicts]
        summary["corruption_accuracy"] = accuracies
        summary["severity_accuracy"] = np.mean(counted, axis=0).tolist()
        summary["mean_corruption_accuracy"] = float(np.mean(counted))
    if "radius" in verdicts:
        # Over all images; misclassified ones count as 0 (Zhai et al., ICLR 2020, "ACR").
        summary["mean_certified_radius"] = float((verdicts["radius"] * verdicts["clean_correct"]).mean())
        summary["abstained"] = int((verdicts["clean_prediction"] < 0).sum())
    return summary
