"""Accuracy under projected gradient descent: an image is robust if it is classified correctly clean and after every
restart (worst case over restarts: Madry et al., ICLR 2018, section 5.2). fp32 throughout.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.evaluation.measures.base import hits, ranked
from pipeline.recipe.objective import ThreatModel
from pipeline.recipe.sections import Evaluation
from pipeline.robustness.attacks import ball_of, pgd
from pipeline.robustness.noise import device_keys


@dataclass(frozen=True)
class Pgd:
    """The PGD evaluation; without a threat model there is no attack."""

    threat_model: ThreatModel | None
    steps: int
    step_size: float
    restarts: int
    seed: int

    @staticmethod
    def of(threat_model: ThreatModel | None, evaluation: Evaluation, seed: int) -> Pgd:
        assert evaluation.step_size is not None
        return Pgd(threat_model, evaluation.steps, float(evaluation.step_size), evaluation.restarts, seed)

    @property
    def name(self) -> str:
        return "pgd"

    @property
    def settings(self) -> dict[str, Any]:
        threat = self.threat_model
        ball = {"norm": threat.norm, "eps": str(threat.eps)} if threat else {"norm": None, "eps": None}
        return {**ball, "steps": self.steps, "restarts": self.restarts, "step_size": self.step_size}

    @property
    def title(self) -> str:
        if self.threat_model is None:
            return "no adversary"
        restarts = f" with {self.restarts} restarts" if self.restarts > 1 else ""
        return f"PGD-{self.steps}{restarts}, {self.threat_model.norm} eps {self.threat_model.eps}"

    def examples(self, network: nn.Module, x: Tensor, y: Tensor, ids: NDArray[np.int64]) -> Iterator[Tensor]:
        """Adversarial examples against `network`, one batch per restart; none without a threat model."""
        if self.threat_model is None:
            return
        ball = ball_of(self.threat_model)
        for restart in range(self.restarts):
            keys = device_keys(ids, x.device, self.seed, "evaluate", restart)
            yield pgd(
                network,
                x,
                lambda logits: F.cross_entropy(logits, y, reduction="none"),
                ball=ball,
                steps=self.steps,
                step_size=self.step_size,
                start=ball.random_start(x, keys),
            )

    def verdicts(self, network: nn.Module, x: Tensor, y: Tensor, ids: NDArray[np.int64]) -> dict[str, Tensor]:
        return worst_case_verdicts(network, x, y, self.examples(network, x, y, ids))


def worst_case_verdicts(network: nn.Module, x: Tensor, y: Tensor, examples: Iterable[Tensor]) -> dict[str, Tensor]:
    """Verdicts from clean images x and their adversarial `examples`, each like x: the worst case over all of them."""
    with torch.no_grad():
        clean = ranked(network(x))
    clean_top1, clean_top5 = hits(clean, y)
    robust_top1, robust_top5 = clean_top1.clone(), clean_top5.clone()
    for adversarial in examples:
        with torch.no_grad():
            top1, top5 = hits(ranked(network(adversarial)), y)
        robust_top1 &= top1
        robust_top5 &= top5
    return {
        "clean_prediction": clean[:, 0],
        "clean_correct": clean_top1,
        "clean_top5": clean_top5,
        "robust_correct": robust_top1,
        "robust_top5": robust_top5,
    }
