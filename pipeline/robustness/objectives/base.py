"""The objective protocol, with its input and output."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from pipeline.robustness.attacks import crafting

Autocast = Callable[[], AbstractContextManager[object]]
"""Returns a new mixed-precision context of the engine at every call; nullcontext for fp32."""

Forward = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class ObjectiveOutput:
    """The loss of a micro-batch, a float32 scalar with its graph, and counts of correct predictions, scalar int64.

    The counts come from the forwards of the loss; None if the objective has no such forward.
    """

    loss: Tensor
    clean_correct: Tensor | None
    robust_correct: Tensor | None
    after_backward: Callable[[], None] = lambda: None
    """Called after the loss's backward and before the optimizer step, for objectives that use the gradient of their own
    tensors."""


@dataclass(frozen=True)
class ObjectiveInput:
    """One micro-batch and the network to train on it.

    Adversarial examples are crafted on `network`, the bare module; the update's forwards use `forward`, an engine with
    its own autocast. Both share the same weights.
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
    """Fraction of the phase's steps completed, in [0, 1); schedules of eps and of loss weights depend on it."""
    attacking: Callable[[], AbstractContextManager[object]] = nullcontext
    """Context entered around the attack, to time it."""
    noise: Tensor | None = None
    """Perturbation [n, ...] float32, for objectives that carry one, else None. Of this micro-batch's positions in the
    step, 0 at the start of a stage, and values written in place persist to the next step; or, for objectives that
    remember perturbations, of its images, in units of eps, and written values persist to the next epoch."""
    unrecorded: Callable[[], AbstractContextManager[object]] = nullcontext
    """Context of training forwards whose batch statistics BatchNorm does not fold in."""
    examples: list[Tensor] = field(default_factory=list)
    """What `craft` has made; at most one."""

    def craft(self, attack: Callable[[], Tensor]) -> Tensor:
        """The adversarial images that `attack` makes on the bare network; made once for all passes over them."""
        if not self.examples:
            with self.attacking(), crafting(self.network, self.autocast):
                self.examples.append(attack())
        return self.examples[0]


class Objective(Protocol):
    """A training objective."""

    def __call__(self, batch: ObjectiveInput) -> ObjectiveOutput:
        """The loss of one micro-batch; the caller calls backward on it once."""
        ...


def craft_forward(network: nn.Module, autocast: Autocast) -> Forward:
    """A forward for crafting examples: under autocast, which the bare module lacks, with float32 logits.

    Each forward enters its own autocast context, because autocast caches weight casts until exit: a cast made under
    no_grad would be reused by later forwards, without a graph to the weight.
    """

    def forward(images: Tensor) -> Tensor:
        with autocast():
            logits = network(images)
        return logits.float()

    return forward


@torch.no_grad()
def count_correct(logits: Tensor, y: Tensor) -> Tensor:
    """Number of logits [n, classes] whose argmax is y [n]: scalar int64 on the same device."""
    return (logits.argmax(dim=1) == y).sum()
