"""A masked weight: its scores, the mask computed from them, and the straight-through gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from pipeline.models.pruning.harp import share_of

CHANNELS_LAST_ON = ("cuda",)
"""Devices on which the product of a convolution has the channels last whatever the weight has: images have, and cuDNN
would transpose a weight that differs at every call. Sums of a CPU depend on it."""
CHANNELS_LAST_ON = ("cuda",)
"""Where products have their channels last, whatever the weight has: ZeRO's weights have not, images have, and cuDNN
would rearrange the weight in every convolution. On a CPU the order of sums, and so their last bits, depend on it."""
RATE_STEP = 0.1
"""Largest gradient of a rate. With 1.0 and the paper's learning rate, 20 steps reallocated most of the budget."""


class _StraightThrough(torch.autograd.Function):
    """weight * mask. dL/dz = dL/dw_eff * w for the ranked importance z, of kept and pruned connections alike (HYDRA).

    z is |s|, or c |s| exp(t) with a learned allocation, where c is constant in the layer. The gradient of scores is the
    same in both: dL/ds = dL/dw_eff * w * sign(s), because the factor c exp(t) does not change the ranking within the
    layer. dL/dt is the sum of dL/dz z over the layer. Its magnitude scales with the loss's gradient and with exp(t):
    used as it is, it made the rates of a small network NaN within 70 steps. It is therefore normalised by the sum of
    |dL/dz z|, which cancels c exp(t): the result, in [-1, 1], measures how far the connections agree in sign, and does
    not shrink with the loss.

    With HARP's shares (`normalised` false), dL/dr of the layer's share r is the sum of dL/dz, as if a larger share
    raised the mask of all connections alike.

    The product may be in half precision under autocast; parameter gradients have the parameter's dtype.
    """

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, mask: Tensor, score: Tensor, rate: Tensor | None, product: Tensor, normalised: bool
    ) -> Tensor:
        ctx.save_for_backward(weight, mask, score, rate)
        ctx.normalised = normalised
        return product

    @staticmethod
    def backward(
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, None, Tensor | None, Tensor | None, None, None]:
        (grad,) = grad_outputs
        weight, mask, score, rate = ctx.saved_tensors
        grad_weight = grad.to(weight.dtype) * mask if ctx.needs_input_grad[0] else None
        grad_score = grad_rate = None
        if ctx.needs_input_grad[2]:
            grad_score = score.sign().mul_(weight).mul_(grad)  # allocates one tensor of the layer's size
        if rate is not None and ctx.needs_input_grad[3] and ctx.normalised:
            terms = grad * weight * score.abs()
            agreement = terms.sum() / terms.abs().sum().clamp_min(torch.finfo(terms.dtype).tiny)
            grad_rate = RATE_STEP * agreement.view(1)
        elif rate is not None and ctx.needs_input_grad[3]:
            grad_rate = (grad * weight).sum().view(1)
        return grad_weight, None, grad_score, grad_rate, None, None


class Masked(nn.Module):
    """Parametrization of a weight: `score` (a parameter of the weight's shape) and the bool `mask` computed from it.

    The mask is not in the state dict, because scores and mask rule determine it.
    """

    mask: Tensor

    def __init__(self, score: Tensor, rate: Tensor | None = None, floor: float | None = None) -> None:
        super().__init__()
        self.score = nn.Parameter(score)
        self.rate = None if rate is None else nn.Parameter(rate)
        """[1]: log of the factor on the layer's scores when layers compete for the budget, or HARP's k; None unless the
        allocation is learned."""
        self._floor = floor
        """Smallest share of the layer under HARP; None with a factor."""
        self.register_buffer("mask", torch.zeros_like(score, dtype=torch.bool), persistent=False)

        self._product = torch.empty(0)
        self._layout: tuple[Any, ...] = ()
        """Shape, strides, device and dtype of the weight that the product was allocated for."""
        self._cache_key: tuple[Any, ...] = ()

    def weight_changed(self) -> None:
        """Call after an optimizer step: fused optimizers and ZeRO do not increment the weight's version counter."""
        self._cache_key = ()

    def forward(self, weight: Tensor) -> Tensor:
        """weight * mask, in the same memory at every step: clone it to keep it longer."""
        product, floor, rate = self._product_of(weight).detach(), self._floor, self.rate
        if rate is not None and floor is not None:
            rate = share_of(rate, floor)
        return _StraightThrough.apply(weight, self.mask, self.score, rate, product, floor is None)  # pyright: ignore[reportReturnType]

    @torch.no_grad()
    def _product_of(self, weight: Tensor) -> Tensor:
        """weight * mask, in autocast's dtype if enabled; cached until weight or mask changes."""
        device = weight.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        cache_key = (weight.data_ptr(), weight._version, self.mask.data_ptr(), self.mask._version, dtype)
        if self._cache_key != cache_key:
            # On a CPU, allocating memory costs more than the product.
            layout = (weight.shape, weight.stride(), weight.device, dtype)
            if self._layout != layout:
                last = weight.dim() == 4 and device in CHANNELS_LAST_ON
                memory_format = torch.channels_last if last else torch.preserve_format
                self._product = torch.empty_like(weight, dtype=dtype, memory_format=memory_format)
                self._layout = layout
            torch.mul(weight, self.mask, out=self._product)
            self._cache_key = cache_key
        return self._product


def masked_layers(network: nn.Module) -> list[nn.Module]:
    """The layers whose weight is masked, so that reading `layer.weight` computes it."""
    return [module for module in network.modules() if parametrization_of(module) is not None]


def parametrization_of(layer: nn.Module) -> Masked | None:
    """The parametrization that masks a layer's weight; None if it has none."""
    if not parametrize.is_parametrized(layer, "weight"):
        return None
    first = layer.parametrizations["weight"][0]  # pyright: ignore[reportIndexIssue, reportCallIssue, reportArgumentType]
    return first if isinstance(first, Masked) else None


@contextmanager
def cached_weights(
    network: nn.Module, autocast: Callable[[], AbstractContextManager[Any]] = nullcontext
) -> Iterator[None]:
    """Compute every masked weight once, without a graph, for all forwards inside the context.

    Under `autocast` they have its dtype, so that no forward casts them. An attack's forwards then build no graph to
    weights or scores; gradients still reach the input. Does nothing for a network without scores.
    """
    with parametrize.cached():
        with torch.no_grad(), autocast():
            weights = [layer.weight for layer in masked_layers(network)]
        assert not any(weight.requires_grad for weight in weights), "a graph was cached before this context"
        yield
