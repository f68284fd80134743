"""A measure plus a probe for catastrophic overfitting: PGD and a one-step attack at training's current eps."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from pipeline.evaluation.measures.base import Measure
from pipeline.evaluation.measures.pgd import Pgd


@dataclass(frozen=True)
class WithOverfittingProbe:
    """Verdicts of `measure` plus bool columns pgd_correct, under `pgd`, and one_step_correct."""

    measure: Measure
    pgd: Pgd

    @property
    def name(self) -> str:
        return self.measure.name

    @property
    def settings(self) -> dict[str, Any]:
        return self.measure.settings | {"probe": self.pgd.settings}

    @property
    def title(self) -> str:
        return f"{self.measure.title}, probed with {self.pgd.title}"

    def verdicts(self, network: nn.Module, x: Tensor, y: Tensor, ids: NDArray[np.int64]) -> dict[str, Tensor]:
        """The single step has length eps, from a random start in the ball (Wong et al., ICLR 2020, algorithm 3)."""
        assert self.pgd.threat_model is not None
        one_step = replace(self.pgd, steps=1, step_size=float(self.pgd.threat_model.eps))
        verdicts = self.measure.verdicts(network, x, y, ids)
        # Once the training attack reaches the full eps, the probe equals the held-out measure.
        probe = verdicts if self.pgd == self.measure else self.pgd.verdicts(network, x, y, ids)
        single = one_step.verdicts(network, x, y, ids)["robust_correct"]
        return verdicts | {"pgd_correct": probe["robust_correct"], "one_step_correct": single}
