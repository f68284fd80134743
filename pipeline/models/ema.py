"""The exponential moving average (EMA) of a network's weights.

After steps 1 to t with decay d, the average is sum_i d^(t-i) w_i / sum_i d^(t-i): the initial weights do not contribute
(the bias correction of Kingma and Ba, ICLR 2015, section 3). Weights are identical on all ranks after each step, so the
average does not depend on the number of ranks.

Trainable tensors (weights or scores) are averaged, and so are BatchNorm's running statistics: they then belong to the
same steps as the weights, and no extra pass over the data is needed. (The statistics of averaged weights are not the
average of the statistics, but close to it, because the steps that dominate the average are close to each other; with a
horizon that reaches back to the first steps of a pruned network they are not.) Masks are not averaged: they are
computed from the averaged scores whenever the average is applied.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.models.pruning.scores import Scores
from pipeline.models.state import load_state, named_state

PREFIX = "ema/"
batched: Any = torch
"""torch, for its multi-tensor functions, which its stubs leave out."""


class Ema:
    """The average of everything that changes during a phase: parameters that require grad, and all buffers.

    Construct it after requires_grad is set for the phase and the network is on its device. It starts with no steps.
    """

    prefix = PREFIX

    def __init__(self, network: nn.Module, decay: float, scores: Scores | None = None) -> None:
        """Errors: ValueError unless 0 <= decay < 1."""
        if not 0 <= decay < 1:
            raise ValueError(f"decay {decay} must lie in [0, 1), for example 0.999")
        self._network, self._decay, self._scores = network, decay, scores
        state = named_state(network).items()
        self._live = {n: t for n, t in state if t.requires_grad or not isinstance(t, nn.Parameter)}
        self._mean = {
            name: (tensor.float() if tensor.is_floating_point() else tensor).detach().clone()
            for name, tensor in self._live.items()
        }

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Add the weights after optimizer step `step`, counted from 1 in each phase.

        Integer buffers are copied. Errors: ValueError unless step >= 1.
        """
        if step < 1:
            raise ValueError(f"step {step} must be at least 1; steps count from 1")
        share = (1.0 - self._decay) / (1.0 - self._decay**step)
        means = {name: mean for name, mean in self._mean.items() if mean.is_floating_point()}
        batched._foreach_lerp_(list(means.values()), [self._live[name].float() for name in means], share)
        if counts := self._mean.keys() - means.keys():
            batched._foreach_copy_([self._mean[name] for name in counts], [self._live[name] for name in counts])

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Swap the average into the network, with masks computed from it; restores the network bit for bit on exit."""
        own = {name: tensor.detach().clone() for name, tensor in named_state(self._network).items()}
        load_state(self._network, own | self._mean, self._scores)
        try:
            yield
        finally:
            load_state(self._network, own, self._scores)

    def state(self) -> dict[str, Tensor]:
        """CPU copies, 'ema/<name as in named_state>' -> float32 (integer buffers as they are)."""
        mean = self._mean.items()  # in the network's memory format; safetensors requires contiguous tensors
        return {PREFIX + name: tensor.to("cpu", copy=True).contiguous() for name, tensor in mean}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Load what `state` returned. Errors: ValueError if its names are not those of the averaged tensors."""
        if mismatch := sorted(tensors.keys() ^ {PREFIX + name for name in self._mean}):
            raise ValueError(f"the average does not fit the tensors that train; first difference: {mismatch[0]}")
        for name, tensor in self._mean.items():
            tensor.copy_(tensors[PREFIX + name])


def overlaid(model: Mapping[str, Tensor], train_state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A checkpoint's network with averaged tensors where the train state has them; the others are unchanged."""
    return {name: train_state.get(PREFIX + name, tensor) for name, tensor in model.items()}
