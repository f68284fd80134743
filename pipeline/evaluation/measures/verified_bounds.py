"""Verified accuracy: images on which bounds over the whole ball prove a network robust.

In fp32, like the PGD evaluation; proofs hold up to float32 rounding (`pipeline.robustness.bounds.propagation`).
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
    """Clean prediction, int64 [n], and whether the image is proved robust, bool [n], which implies correct."""

    prediction: Tensor
    proved: Tensor


@torch.no_grad()
def verified(network: nn.Module, images: Tensor, labels: Tensor, eps: float, symbolic: bool = False) -> Verified:
    """Prove robustness over the Linf ball of radius eps, intersected with [0, 1].

    images [n, ...] float32 in [0, 1], labels [n] int64. An image is proved robust if the larger of its IBP and
    CROWN-IBP margins is positive for every wrong class. With `symbolic`, MixTrain's symbolic intervals are
    tried on the remaining correct images, one by one: seconds each on a CPU if many ReLUs are undecided.
    The network is put in eval mode and restored.
    Errors: ValueError naming a layer without bounds.
    """
    with crafting(network), torch.autocast(images.device.type, enabled=False):
        graph = trace(network)
        prediction = network(images).argmax(dim=1)
        bounds = interval_bounds(graph, linf_box(images, eps))
        margins = torch.maximum(bounds.interval_margins(labels), bounds.linear_margins(labels))
        is_proved = proved(margins, labels) & (prediction == labels)
        if symbolic:
            for i in ((prediction == labels) & ~is_proved).nonzero().flatten().tolist():
                is_proved[i] = _prove_symbolically(graph, images[i : i + 1], labels[i : i + 1], eps)
    return Verified(prediction, is_proved)


@dataclass(frozen=True)
class Proved:
    """Proofs as a meais_proved: an image is robust if it is classified correctly and `verified` at eps."""

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
        prediction, is_proved = verified(network, x, y, float(self.threat_model.eps), self.symbolic)
        return {"clean_prediction": prediction, "clean_correct": prediction == y, "robust_correct": is_proved}


def _prove_symbolically(graph: Graph, image: Tensor, label: Tensor, eps: float) -> Tensor:
    """Whether the largest of three margins under symbolic intervals proves the image: bool scalar."""
    bounds = symbolic_bounds(graph, linf_box(image, eps))
    parallel, adaptive = (bounds.linear_margins(label, lines) for lines in (True, False))
    return proved(torch.maximum(bounds.interval_margins(label), torch.maximum(parallel, adaptive)), label)[0]
