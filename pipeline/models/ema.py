"""The exponential moving average of a network's weights, as plain tensors under plain names.

After steps 1 to t with decay d the average is sum_i d^(t-i) w_i / sum_i d^(t-i): every step's weights, later ones the
more, and nothing of the initial ones (Kingma and Ba, ICLR 2015, section 3, divide out the same bias). Every rank holds
the same weights after a step, so every rank has the same average, whatever their number.

What trains is averaged, weights or scores, and so are BatchNorm's running statistics: they then belong to the same
steps as the weights do, and no pass over the data is needed. (Averaged weights' own statistics are not the average of
the statistics, but near it, because the steps that count are near each other.) Masks are not averaged: they are made
anew, from the averaged scores, whenever the average is put into a network.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from pipeline.models.pruning.scores import load_state, named_state

PREFIX = "ema/"


def _averaged_part(network: nn.Module) -> dict[str, Tensor]:
    """What changes while a phase trains: parameters that have requires_grad, and all buffers."""
    return {name: t for name, t in named_state(network).items() if t.requires_grad or not isinstance(t, nn.Parameter)}


@torch.no_grad()
def start_average(network: nn.Module) -> dict[str, Tensor]:
    """An average of no steps yet: 'ema/<name as in named_state>' -> tensor, float32 (integer buffers as they are).

    Call it when requires_grad is set for the phase. The tensors are state: a checkpoint holds them as they are.
    """
    parts = _averaged_part(network).items()
    return {PREFIX + name: (t.float() if t.is_floating_point() else t).detach().clone() for name, t in parts}


@torch.no_grad()
def update_average(average: Mapping[str, Tensor], network: nn.Module, decay: float, step: int) -> None:
    """Take in the weights after optimizer step number `step`, 1 for the first of the phase; in place.

    Integer buffers become the network's own. Errors: ValueError unless 0 <= decay < 1 and step >= 1, or when the
    average is of other tensors.
    """
    if not 0 <= decay < 1 or step < 1:
        raise ValueError(f"decay {decay} must lie in [0, 1), for example 0.999, and step {step} count from 1")
    parts = _averaged_part(network)
    _check_names(average, parts)
    share = (1.0 - decay) / (1.0 - decay**step)
    for name, tensor in parts.items():
        mean = average[PREFIX + name]
        if mean.is_floating_point():
            mean.lerp_(tensor.to(mean.dtype), share)
        else:
            mean.copy_(tensor)


def overlaid(model: Mapping[str, Tensor], average: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A network's state with the average in place of what it is an average of; as it is where there is none."""
    return {name: average.get(PREFIX + name, tensor) for name, tensor in model.items()}


@contextmanager
def averaged(network: nn.Module, average: Mapping[str, Tensor]) -> Iterator[None]:
    """The network with the average in place of what trains, and masks made from it; put back bit for bit afterwards.

    Errors: ValueError when the average is of other tensors.
    """
    _check_names(average, _averaged_part(network))
    own = {name: tensor.detach().clone() for name, tensor in named_state(network).items()}
    load_state(network, overlaid(own, average))
    try:
        yield
    finally:
        load_state(network, own)


def _check_names(average: Mapping[str, Tensor], parts: Mapping[str, Tensor]) -> None:
    odd = sorted(average.keys() ^ {PREFIX + name for name in parts})
    if odd:
        raise ValueError(f"the average is of other tensors than what trains; first difference: {odd[0]}")
