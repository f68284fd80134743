"""What the attack on an exported file found, and whether its robust accuracy may be relied on."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.evaluation.honesty.checks import exceeds
from pipeline.evaluation.measures.base import Verdicts, summarise
from pipeline.evaluation.result import Accuracy, EvaluationHeader, EvaluationResult
from pipeline.evaluation.statistics import mcnemar, paired_interval, wilson_interval
from pipeline.run.records import Count, Record, Share

MASKED = 0.02
"""Share of the images withstanding every gradient attack that the others may break on a file that masks no gradient."""
SAME_LOGITS = 0.05
"""Largest difference between twin and file, as a share of the file's largest |logit|: integer arithmetic rounds the
sums of a layer where the twin does not, which moves a logit by a step or two of 256."""
DIFFERENT = 0.02
"""Share of images on which twin and file may differ by more."""
COLUMNS = (
    *("broken_gradient", "broken_scaled", "broken_disagreement", "broken_transfer", "broken_square"),
    *("network_clean_correct", "network_robust_correct", "transfer_correct", "twin_gap"),
)
"""Of the verdicts, beside those that all have."""


class Comparison(Record):
    """The file's accuracy minus the network's, on the same images: McNemar's exact test, and a 95 % interval."""

    only_file: Count
    only_network: Count
    p_value: Share
    difference: float
    low: float
    high: float


class FileAttackResult(EvaluationResult):
    """Accuracies of the file; `model_sha256` is the network's, and the file's is in `settings`."""

    network_clean_correct: Count
    network_clean_accuracy: Accuracy
    network_robust_correct: Count
    network_robust_accuracy: Accuracy
    clean_comparison: Comparison
    robust_comparison: Comparison
    transfer_correct: Count
    """Images that the file classifies correctly, clean and as the network's adversarial examples."""
    doubts: tuple[str, ...]
    """Why the robust accuracy may not be relied on; without one, the file is stamped."""

    @property
    def file_sha256(self) -> str:
        return str(self.settings.get("file_sha256"))

    def counts(self) -> dict[str, Any]:
        """What its verdicts determine exactly."""
        names = ("images", "clean_correct", "robust_correct", "transfer_correct", "broken_by", "doubts")
        network = ("network_clean_correct", "network_robust_correct")
        return {name: getattr(self, name) for name in (*names, *network)}


def attack_result(header: EvaluationHeader, verdicts: Verdicts) -> FileAttackResult:
    """`verdicts` are those of `file_attack.FileAttack`."""
    total, values = len(verdicts["sample_id"]), header.to_json() | summarise(verdicts)
    for kind in ("clean", "robust"):
        network = verdicts[f"network_{kind}_correct"]
        values[f"network_{kind}_correct"] = count = int(network.sum())
        low, high = wilson_interval(count, total)
        values[f"network_{kind}_accuracy"] = {"value": count / total, "low": low, "high": high}
        values[f"{kind}_comparison"] = _comparison(verdicts[f"{kind}_correct"], network)
    values["transfer_correct"] = int(verdicts["transfer_correct"].sum())
    values["doubts"] = tuple(_doubts(verdicts))
    return FileAttackResult.parse(values)


def _comparison(file: NDArray[np.bool_], network: NDArray[np.bool_]) -> dict[str, Any]:
    test = mcnemar(file, network)
    low, high = paired_interval(test.only_first, test.only_second, len(file))
    values = {"only_file": test.only_first, "only_network": test.only_second, "p_value": test.p_value}
    return values | {"difference": test.difference, "low": low, "high": high}


def _doubts(verdicts: Verdicts) -> list[str]:
    doubts, total = [], len(verdicts["sample_id"])
    different = int((~(verdicts["twin_gap"] <= SAME_LOGITS)).sum())  # also for NaN
    if exceeds(different, total, DIFFERENT):
        doubts.append(
            f"the logits of the file and of its twin differ by more than {100 * SAME_LOGITS:g} % of the largest for "
            f"{different} of {total} images, so the gradients that the attacks followed are not the file's"
        )
    found = int((verdicts["broken_transfer"] | verdicts["broken_square"]).sum())
    withstanding = found + int(verdicts["robust_correct"].sum())
    if exceeds(found, withstanding, MASKED):
        doubts.append(
            f"of the {withstanding} images that withstand every attack along the file's gradient, {found} are broken "
            "by the network's adversarial examples or by Square: the file masks its gradient, so stronger attacks may "
            "lower its robust accuracy further"
        )
    return doubts
