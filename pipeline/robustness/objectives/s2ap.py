"""S2AP: sharpness-aware scores (arXiv 2510.18381)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from pipeline.models.pruning.scores import Scores
from pipeline.robustness.objectives.base import Objective, ObjectiveInput, ObjectiveOutput, craft_forward

GAMMA = 0.01
"""Length of the perturbation of a layer's scores, in multiples of theirs. The paper's constant is not known to us; this
is that of AWP, whose perturbation of weights has the same form (Wu, Xia and Wang, NeurIPS 2020). On the demo's dense
network at 99 % pruned it exchanges about 1 % of the kept connections and raises the loss of a micro-batch from 2.18 to
2.35, and the gradient keeps its direction (cosines of 0.8 to 1); at 0.1, that of most layers is orthogonal."""


def sharpness_aware(objective: Objective, scores: Scores) -> Objective:
    """The objective at scores that are shifted to where its loss is higher: min over s of max over z of L(s + z).

    On the adversarial images of a micro-batch, z is one step of `ascent`. Masks are ranked again for s + z, and the
    gradient there, on the same images, is applied to s, which `after_backward` restores. z belongs to one micro-batch
    and never leaves its worker, so results do not depend on the number of workers (the m-sharpness of Foret et al.,
    ICLR 2021). BatchNorm's statistics are those of the first pass, as s is the network that is kept.
    """

    def sharp(batch: ObjectiveInput) -> ObjectiveOutput:
        parameters = scores.parameters()
        first = objective(replace(batch, forward=craft_forward(batch.network, batch.autocast)))
        gradients = torch.autograd.grad(first.loss, list(parameters.values()), materialize_grads=True)
        restore = scores.shift(ascent(parameters, dict(zip(parameters, gradients, strict=True))))
        with batch.unrecorded():
            output = objective(batch)

        def after_backward() -> None:
            restore()
            output.after_backward()

        return replace(output, after_backward=after_backward)

    return sharp


@torch.no_grad()
def ascent(scores: Mapping[str, Tensor], gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """z = GAMMA |s| g / |g| per layer, in Euclidean norms. Zero where |g| is zero, or not finite: the loop names such a
    loss, on all workers together."""
    changes = {}
    for name, score in scores.items():
        length = torch.linalg.vector_norm(gradients[name])
        scaled = gradients[name] * (GAMMA * torch.linalg.vector_norm(score) / length)
        changes[name] = torch.where(torch.isfinite(scaled), scaled, 0.0)
    return changes
