"""Accuracy under adversarial examples transferred from another network, usually the dense one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from pipeline.evaluation.measures.pgd import Pgd, worst_case_verdicts
from pipeline.robustness.attacks import crafting


@dataclass(frozen=True)
class Transfer:
    """PGD examples against `source`, evaluated on the network; gradient masking does not weaken them."""

    source: nn.Module
    source_sha256: str
    """Of the source's model file."""
    pgd: Pgd

    @property
    def name(self) -> str:
        return "transfer"

    @property
    def settings(self) -> dict[str, Any]:
        return self.pgd.settings | {"source_sha256": self.source_sha256}

    @property
    def title(self) -> str:
        return f"{self.pgd.title}, made on another network ({self.source_sha256[:12]})"

    def verdicts(self, network: nn.Module, x: Tensor, y: Tensor, ids: NDArray[np.int64]) -> dict[str, Tensor]:
        with crafting(self.source):
            return worst_case_verdicts(network, x, y, self.pgd.examples(self.source, x, y, ids))
