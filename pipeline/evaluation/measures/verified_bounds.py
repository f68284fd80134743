"""Which images a network is proved robust on, by bounds that hold for every adversary in the ball.

In fp32, as PGD's evaluation; a proof is as good as float32's rounding (`pipeline.robustness.bounds.propagation`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pipeline.recipe.objective import ThreatModel
from pipeline.robustness.attacks import crafting
from pipeline.robustness.bounds import Graph, interval_bounds, linf_box, proved, symbolic_bounds, trace


class Verified(NamedTuple):
    """Clean prediction, int64 [n], and whether the image is proved robust, bool [n]; what is proved is right clean."""

    prediction: Tensor
    proved: Tensor


@torch.no_grad()
def verified(network: nn.Module, images: Tensor, labels: Tensor, eps: float, symbolic: bool = False) -> Verified:
    """Proofs over the Linf ball of radius eps, cut with [0, 1].

    images [n, ...] float32 in [0, 1], labels [n] int64. An image is proved robust if the larger of its IBP and
    CROWN-IBP margins is positive for every wrong class. With `symbolic`, MixTrain's symbolic intervals are asked as
    well about images that are right but not proved yet, one by one: seconds each on a CPU if many ReLUs are undecided.
    The network is used in eval mode, and its modes are put back.
    Errors: ValueError naming a layer without bounds.
    """
    with crafting(network), torch.autocast(images.device.type, enabled=False):
        graph = trace(network)
        prediction = network(images).argmax(dim=1)
        bounds = interval_bounds(graph, linf_box(images, eps))
        margins = torch.maximum(bounds.interval_margins(labels), bounds.linear_margins(labels))
        sure = proved(margins, labels) & (prediction == labels)
        if symbolic:
            for i in ((prediction == labels) & ~sure).nonzero().flatten().tolist():
                sure[i] = _symbolically(graph, images[i : i + 1], labels[i : i + 1], eps)
    return Verified(prediction, sure)


@dataclass(frozen=True)
class Proved:
    """Proofs as a measure: an image is robust if it is right and `verified` at eps."""

    threat_model: ThreatModel
    symbolic: bool

    @property
    def name(self) -> str:
        return "verified"

    @property
    def settings(self) -> dict[str, Any]:
        return {"norm": "linf", "eps": str(self.threat_model.eps), "symbolic": self.symbolic}

    @property
    def title(self) -> str:
        symbolic = " and symbolic intervals" if self.symbolic else ""
        return f"verified at linf eps {self.threat_model.eps} by IBP, CROWN-IBP{symbolic}"

    def verdicts(self, network: nn.Module, x: Tensor, y: Tensor, ids: NDArray[np.int64]) -> dict[str, Tensor]:
        found = verified(network, x, y, float(self.threat_model.eps), self.symbolic)
        right = found.prediction == y
        return {"clean_prediction": found.prediction, "clean_correct": right, "robust_correct": found.proved}


def _symbolically(graph: Graph, image: Tensor, label: Tensor, eps: float) -> Tensor:
    """With the boxes of symbolic intervals, whichever of the three kinds of margin is largest: bool scalar."""
    bounds = symbolic_bounds(graph, linf_box(image, eps))
    parallel, adaptive = (bounds.linear_margins(label, lines) for lines in (True, False))
    return proved(torch.maximum(bounds.interval_margins(label), torch.maximum(parallel, adaptive)), label)[0]
