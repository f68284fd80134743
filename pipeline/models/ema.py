"""The exponential moving average of a network's weights.

After steps 1 to t with decay d the average is sum_i d^(t-i) w_i / sum_i d^(t-i): every step's weights, later ones the
more, and nothing of the initial ones (Kingma and Ba, ICLR 2015, section 3, divide out the same bias). Every rank holds
the same weights after a step, so every rank has the same average, whatever their number.

What trains is averaged, weights or scores, and so are BatchNorm's running statistics: they then belong to the same
steps as the weights do, and no pass over the data is needed. (Averaged weights' own statistics are not the average of
the statistics, but near it, because the steps that count are near each other.) Masks are not averaged: they are made
from the averaged scores whenever the average is put into a network.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from pipeline.models.pruning.scores import Scores
from pipeline.models.state import load_state, named_state

PREFIX = "ema/"


class Ema:
    """The average of what changes while a phase trains: parameters that have requires_grad, and all buffers.

    Made when requires_grad is set for the phase and the network is where it trains; it is of no steps yet.
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
        """Take in the weights after optimizer step number `step`, 1 for the first of the phase.

        Integer buffers become the network's own. Errors: ValueError unless step >= 1.
        """
        if step < 1:
            raise ValueError(f"step {step} must count from 1")
        share = (1.0 - self._decay) / (1.0 - self._decay**step)
        for name, tensor in self._live.items():
            mean = self._mean[name]
            if mean.is_floating_point():
                mean.lerp_(tensor.to(mean.dtype), share)
            else:
                mean.copy_(tensor)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The network with the average in place of what trains, and masks made from it; put back bit for bit."""
        own = {name: tensor.detach().clone() for name, tensor in named_state(self._network).items()}
        load_state(self._network, own | self._mean, self._scores)
        try:
            yield
        finally:
            load_state(self._network, own, self._scores)

    def state(self) -> dict[str, Tensor]:
        """CPU copies, 'ema/<name as in named_state>' -> float32 (integer buffers as they are)."""
        mean = self._mean.items()  # in the network's own memory layout, which safetensors does not write
        return {PREFIX + name: tensor.to("cpu", copy=True).contiguous() for name, tensor in mean}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what `state` returned. Errors: ValueError when it is an average of other tensors."""
        if odd := sorted(tensors.keys() ^ {PREFIX + name for name in self._mean}):
            raise ValueError(f"the average is of other tensors than what trains; first difference: {odd[0]}")
        for name, tensor in self._mean.items():
            tensor.copy_(tensors[PREFIX + name])


def overlaid(model: Mapping[str, Tensor], train_state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A checkpoint's network with the average in place of what it is an average of; as it is where there is none."""
    return {name: train_state.get(PREFIX + name, tensor) for name, tensor in model.items()}
