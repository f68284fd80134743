"""A masked weight: its score, the mask made from it, and the gradient that passes straight through the ranking."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

RATE_STEP = 0.1
"""Largest gradient of a rate. With 1.0 and the paper's learning rate, 20 steps dealt most of a budget anew."""


class _StraightThrough(torch.autograd.Function):
    """weight * mask. dL/dz = dL/dw_eff * w for the importance z that is ranked, of kept and pruned alike (HYDRA).

    z is |s|, and c |s| exp(t) where the allocation is learned, c being the same throughout the layer. Scores learn as
    without a rate t: dL/ds = dL/dw_eff * w * sign(s), as the layer's factor c exp(t) ranks nothing inside it. dL/dt is
    the sum of dL/dz z over the layer. Its length says how steep the loss is, and grows with exp(t): trained by it, the
    rates of a small network were NaN within 70 steps. So it is divided by the sum of |dL/dz z|, in which c exp(t) drops
    out: what is left, in [-1, 1], is how far the connections agree. It does not shrink with the loss.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, mask: Tensor, score: Tensor, rate: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight, mask, score, rate)
        return weight * mask

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, None, Tensor | None, Tensor | None]:
        (grad,) = grad_outputs
        weight, mask, score, rate = ctx.saved_tensors
        grad_weight = grad * mask if ctx.needs_input_grad[0] else None
        grad_score = grad_rate = None
        if ctx.needs_input_grad[2]:
            grad_score = grad * weight * score.sign()
        if rate is not None and ctx.needs_input_grad[3]:
            pulls = grad * weight * score.abs()
            agreement = pulls.sum() / pulls.abs().sum().clamp_min(torch.finfo(pulls.dtype).tiny)
            grad_rate = RATE_STEP * agreement.view(1)
        return grad_weight, None, grad_score, grad_rate


class Masked(nn.Module):
    """Parametrization of a weight: `score` (a parameter of the weight's shape) and the bool `mask` made from it.

    The mask is no part of the state dict, because the scores and what deals them say all of it.
    """

    mask: Tensor

    def __init__(self, score: Tensor, rate: Tensor | None = None) -> None:
        super().__init__()
        self.score = nn.Parameter(score)
        self.rate = None if rate is None else nn.Parameter(rate)
        """[1]: logarithm of what the layer's scores are multiplied by where layers compete; None: by nothing."""
        self.register_buffer("mask", torch.zeros_like(score, dtype=torch.bool), persistent=False)

    def forward(self, weight: Tensor) -> Tensor:
        return _StraightThrough.apply(weight, self.mask, self.score, self.rate)  # pyright: ignore[reportReturnType]
