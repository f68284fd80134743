"""What an objective is, what it is given and what it returns."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

Autocast = Callable[[], AbstractContextManager[object]]
"""Opens the engine's mixed-precision context anew at every call; nullcontext for fp32."""

Forward = Callable[[Tensor], Tensor]


def nothing_left() -> None:
    """Most objectives are done when they return."""


@dataclass(frozen=True)
class ObjectiveOutput:
    """The loss of a micro-batch, a float32 scalar with its graph, and counts of correct predictions, scalar int64.

    The counts are of the forwards that the loss is made of; None where the objective has no such forward.
    """

    loss: Tensor
    clean_correct: Tensor | None
    robust_correct: Tensor | None
    after_backward: Callable[[], None] = nothing_left
    """Called right after the loss's backward, before the parameters move: for what needs the gradient that this one
    backward leaves at tensors of the objective's own."""


@dataclass(frozen=True)
class ObjectiveInput:
    """One micro-batch, and what an objective may do with it.

    `network` is the bare module that adversarial examples are crafted on; `forward` is what the update's forwards go
    through, an engine with its own autocast. Both lead to the same weights.
    """

    network: nn.Module
    forward: Forward
    x: Tensor
    """Images [n, ...] float32 in [0, 1]."""
    y: Tensor
    """Classes [n] int64."""
    keys: Tensor
    """One random stream per sample, [n] int64."""
    autocast: Autocast = nullcontext
    elapsed: float = 0.0
    """Share of the phase's steps that are done, in [0, 1): what schedules of eps and of mixing go by."""
    attacking: Callable[[], AbstractContextManager[object]] = nullcontext
    """Opened around the attack, for whoever wants to know how long it takes; nothing else depends on it."""
    noise: Tensor | None = None
    """Perturbation [n, ...] float32 of this micro-batch's places in the step, 0 when a stage begins; what is written
    to it is there again in the next step. For objectives that carry one; None for the others."""


class Objective(Protocol):
    """A robust training technique, as a function."""

    def __call__(self, given: ObjectiveInput) -> ObjectiveOutput:
        """The loss of one micro-batch. The caller calls backward, once."""
        ...


def craft_forward(network: nn.Module, autocast: Autocast) -> Forward:
    """A forward for crafting: under autocast, which the bare module lacks, with float32 logits.

    Autocast is opened per forward, because it keeps its casts of the weights until it is left: one made under no_grad
    would stand in for the weight in a later forward.
    """

    def forward(images: Tensor) -> Tensor:
        with autocast():
            logits = network(images)
        return logits.float()

    return forward


@torch.no_grad()
def count_correct(logits: Tensor, y: Tensor) -> Tensor:
    """How many of logits [n, classes] have their largest entry at y [n]: scalar int64 on the same device."""
    return (logits.argmax(dim=1) == y).sum()
