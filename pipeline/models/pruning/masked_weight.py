"""A masked weight: its score, the mask made from it, and the gradient that passes straight through the ranking."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

RATE_STEP = 0.1
"""Largest gradient of a rate. With 1.0 and the paper's learning rate, 20 steps reallocated most of the budget."""


class _StraightThrough(torch.autograd.Function):
    """weight * mask. dL/dz = dL/dw_eff * w for the importance z that is ranked, of kept and pruned alike (HYDRA).

    z is |s|, and c |s| exp(t) where the allocation is learned, c being the same throughout the layer. Scores learn as
    without a rate t: dL/ds = dL/dw_eff * w * sign(s), as the layer's factor c exp(t) ranks nothing inside it. dL/dt is
    the sum of dL/dz z over the layer. Its length says how steep the loss is, and grows with exp(t): trained by it, the
    rates of a small network were NaN within 70 steps. So it is divided by the sum of |dL/dz z|, in which c exp(t) drops
    out: what is left, in [-1, 1], is how far the connections agree. It does not shrink with the loss.

    The product may be in half precision, as a layer under autocast has it; a parameter's gradient is in its own.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, mask: Tensor, score: Tensor, rate: Tensor | None, product: Tensor) -> Tensor:
        ctx.save_for_backward(weight, mask, score, rate)
        return product

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, None, Tensor | None, Tensor | None, None]:
        (grad,) = grad_outputs
        weight, mask, score, rate = ctx.saved_tensors
        grad_weight = grad.to(weight.dtype) * mask if ctx.needs_input_grad[0] else None
        grad_score = grad_rate = None
        if ctx.needs_input_grad[2]:
            grad_score = score.sign().mul_(weight).mul_(grad)  # in one tensor of the layer's size
        if rate is not None and ctx.needs_input_grad[3]:
            pulls = grad * weight * score.abs()
            agreement = pulls.sum() / pulls.abs().sum().clamp_min(torch.finfo(pulls.dtype).tiny)
            grad_rate = RATE_STEP * agreement.view(1)
        return grad_weight, None, grad_score, grad_rate, None


class Masked(nn.Module):
    """Parametrization of a weight: `score` (a parameter of the weight's shape) and the bool `mask` made from it.

    The mask is no part of the state dict, because scores and mask rule determine it.
    """

    mask: Tensor

    def __init__(self, score: Tensor, rate: Tensor | None = None) -> None:
        super().__init__()
        self.score = nn.Parameter(score)
        self.rate = None if rate is None else nn.Parameter(rate)
        """[1]: logarithm of what the layer's scores are multiplied by where layers compete; None: by nothing."""
        self.register_buffer("mask", torch.zeros_like(score, dtype=torch.bool), persistent=False)

        self._product = torch.empty(0)
        self._made_from: tuple[Any, ...] = ()

    def weight_changed(self) -> None:
        """To be called when an optimizer has moved the weight: fused ones and ZeRO do so behind torch's back."""
        self._made_from = ()

    def forward(self, weight: Tensor) -> Tensor:
        """weight * mask, in the same memory at every step: a reader who keeps it longer clones it."""
        product = self._product_of(weight).detach()
        return _StraightThrough.apply(weight, self.mask, self.score, self.rate, product)  # pyright: ignore[reportReturnType]

    @torch.no_grad()
    def _product_of(self, weight: Tensor) -> Tensor:
        """weight * mask, in autocast's precision if that is on; kept until weight or mask changes."""
        device = weight.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        made_from = (weight.data_ptr(), weight._version, self.mask.data_ptr(), self.mask._version, dtype)
        if self._made_from != made_from:
            # Fresh memory costs a CPU more than the product itself.
            like = (weight.shape, weight.stride(), weight.device, dtype)
            if (self._product.shape, self._product.stride(), self._product.device, self._product.dtype) != like:
                self._product = torch.empty_like(weight, dtype=dtype)
            torch.mul(weight, self.mask, out=self._product)
            self._made_from = made_from
        return self._product


def masked_layers(network: nn.Module) -> list[nn.Module]:
    """The layers whose weight is masked, so that reading `layer.weight` computes it."""
    return [module for module in network.modules() if parametrization_of(module) is not None]


def parametrization_of(layer: nn.Module) -> Masked | None:
    """The parametrization that masks a layer's weight."""
    if not parametrize.is_parametrized(layer, "weight"):
        return None
    first = layer.parametrizations["weight"][0]  # pyright: ignore[reportIndexIssue, reportCallIssue, reportArgumentType]
    return first if isinstance(first, Masked) else None


@contextmanager
def cached_weights(
    network: nn.Module, autocast: Callable[[], AbstractContextManager[Any]] = nullcontext
) -> Iterator[None]:
    """Compute every masked weight once, and without a graph, for all forwards inside the context.

    Under `autocast` they are in its precision, so that no forward has to cast them. An attack's forwards then build no
    graph to weights or scores; gradients to the input flow as ever. Without scores there is nothing to compute.
    """
    with parametrize.cached():
        with torch.no_grad(), autocast():
            weights = [layer.weight for layer in masked_layers(network)]
        assert not any(weight.requires_grad for weight in weights), "a graph was cached before this context"
        yield
