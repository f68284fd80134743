"""Masks that change while the weights train: gradual pruning.

The scores of such a stage are binary: they are its masks, and so these are in its checkpoints. A connection that is
pruned loses its weight and optimizer state. Both then stay zero, as the gradient of a pruned weight is zero: it is as
if they were masked after every step.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from fractions import Fraction

import torch
from torch import Tensor

from pipeline.models.pruning.allocation import mask_rule
from pipeline.models.pruning.scores import Scores
from pipeline.recipe.methods import Allocation
from pipeline.recipe.schedules import kept_fraction_at
from pipeline.recipe.stages import Stage
from pipeline.run.progress import Progress
from pipeline.training.engine import Engine

GRADUAL_INTERVAL_EPOCHS = Fraction(1, 10)
"""Between two updates of gradual pruning: 39 steps of 128 of CIFAR-10's images, 125 of 1,024 of ImageNet's. Zhu and
Gupta (2017, section 3) found 100 to 1,000 steps to be alike, of trainings that were longer."""


class DynamicMasks(ABC):
    """Changes the masks of one stage as its training goes on."""

    settled_step: int
    """First step after which the masks have the stage's budget until its end."""

    def __init__(self, scores: Scores, engine: Engine) -> None:
        """Prunes the weights that the stage starts with. Collective."""
        self._scores, self._engine = scores, engine
        engine.apply_masks()

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Change the masks if they change after `step`, counted from 1. Collective.

        Errors: ValueError naming a weight that is NaN.
        """
        masks = self._masks_after(step)
        if masks is not None:
            self._scores.set_masks(masks)
            self._engine.apply_masks()

    @abstractmethod
    def _masks_after(self, step: int) -> Mapping[str, Tensor] | None:
        """The masks from this step on, from the weights and masks of now; None if they stay."""


class GradualPruning(DynamicMasks):
    """Prunes the smallest weights by and by (Zhu and Gupta, 2017), from the dense network on.

    What is pruned stays so, unless a layer of ERK's is given one connection more by rounding: that starts at zero.
    """

    def __init__(self, stage: Stage, scores: Scores, engine: Engine, progress: Progress) -> None:
        assert stage.keep_fraction is not None
        assert stage.prune_share is not None
        super().__init__(scores, engine)
        self._keep_fraction = stage.keep_fraction
        self._allocation: Allocation = stage.allocation
        self._every = max(round(GRADUAL_INTERVAL_EPOCHS * progress.steps_per_epoch), 1)
        self.settled_step = max(int(stage.prune_share * progress.total_steps), 1)

    def _masks_after(self, step: int) -> Mapping[str, Tensor] | None:
        if step > self.settled_step or (step % self._every and step != self.settled_step):
            return None
        weights, masks = self._scores.weights(), self._scores.masks()
        keep = kept_fraction_at(self._keep_fraction, Fraction(step, self.settled_step))
        rule = mask_rule({name: weight.shape for name, weight in weights.items()}, keep, self._allocation)
        tiny = {name: torch.finfo(weight.dtype).tiny for name, weight in weights.items()}
        # A kept weight that is zero ranks before the pruned ones.
        return rule({n: weight.abs().clamp_min(tiny[n]) * masks[n] for n, weight in weights.items()}, {})


def build_dynamic_masks(stage: Stage, scores: Scores, engine: Engine, progress: Progress) -> DynamicMasks:
    return GradualPruning(stage, scores, engine, progress)
