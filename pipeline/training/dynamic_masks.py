"""Masks that change while the weights train: gradual pruning, and Flying Bird's exchange of connections.

The scores of such a stage are binary: they are its masks, and so these are in its checkpoints. A connection that is
pruned loses its weight and optimizer state. Both then stay zero, as the gradient of a pruned weight is zero: it is as
if they were masked after every step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction
from itertools import pairwise

import torch
from torch import Tensor

from pipeline.models.pruning.drop_and_grow import drop_and_grow, exchange_counts
from pipeline.models.pruning.score_init import uniform_draws
from pipeline.models.pruning.scores import Scores
from pipeline.recipe.methods import FROM_SCRATCH, Allocation
from pipeline.recipe.schedules import drop_fraction_at, kept_fraction_at
from pipeline.recipe.stages import Stage
from pipeline.run.progress import Progress
from pipeline.training.engine import Engine

GRADUAL_INTERVAL_EPOCHS = Fraction(1, 10)
"""Between two updates of gradual pruning: 39 steps of 128 of CIFAR-10's images, 125 of 1,024 of ImageNet's. Zhu and
Gupta (2017, section 3) found 100 to 1,000 steps to be alike, of trainings that were longer."""


EARLY_INTERVAL, LATE_INTERVAL = Fraction(900, 200 * 391), Fraction(1200, 200 * 391)
"""Between two of Flying Bird's updates, in the first and second half, as shares of the stage: the authors' 900 and
1,200 steps of 200 epochs, each of 391 steps of 128 of CIFAR-10's images. That is 2.3 and 3.1 of 200 epochs, 75 updates.
"""
FEWER, MORE = 0.4, 0.05
"""Flying Bird+: how much more is dropped, as a share of what is exchanged; and grown, as a share of what is kept."""
EPOCHS_COMPARED = 4
ADAPTS_FROM, ADAPTS_UNTIL = Fraction(1, 2), Fraction(3, 4)
"""Flying Bird+ may change its sparsity in this part of the stage, of the authors' from epoch 100 of 200 on. Then
every layer has its budget again, so that what is compared are networks of one sparsity."""


class DynamicMasks:
    """Changes the masks of one stage as its training goes on."""

    prefix = "dynamic/"

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

    def count(self, robust_correct: int, images: int) -> None:
        """Take note of a step's images, over all ranks."""

    def validated(self, robust_accuracy: float) -> None:
        """Take note of the accuracy on the held-out images at the end of an epoch."""

    def state(self) -> dict[str, Tensor]:
        """Checkpoint tensors; masks alone, which the scores are, have none."""
        return {}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what `state` returned."""

    def _masks_after(self, step: int) -> Mapping[str, Tensor] | None:
        """The masks from this step on, from the weights and masks of now; None if they stay."""
        raise NotImplementedError


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
        rule = self._scores.structure.mask_rule(keep, self._allocation)
        tiny = {name: torch.finfo(weight.dtype).tiny for name, weight in weights.items()}
        # A kept weight that is zero ranks before the pruned ones.
        return rule({n: weight.abs().clamp_min(tiny[n]) * masks[n] for n, weight in weights.items()}, {})


class FlyingBird(DynamicMasks):
    """Every layer exchanges its smallest weights for random connections, fewer from update to update.

    Which are grown is a function of the seed, stage, layer and step. Under a structure of blocks, units are exchanged:
    the weight of one, and its draw, is the sum over its connections.
    """

    settled_step = 0

    def __init__(self, stage: Stage, seed: int, scores: Scores, engine: Engine, progress: Progress) -> None:
        super().__init__(scores, engine)
        self._stage, self._seed, self._total = stage, seed, progress.total_steps

    def _masks_after(self, step: int) -> Mapping[str, Tensor] | None:
        if step % self._interval(step) or step == self._total:
            return None
        fraction, key, structure = drop_fraction_at(step / self._total), self._stage.random_key, self._scores.structure
        weights = self._scores.weights()
        draws = {name: uniform_draws(w, self._seed, "grow", key, name, step) for name, w in weights.items()}
        draws, masks, result = structure.units(draws), self._unit_masks(), {}
        for name, weight in structure.units(weights).items():
            mask = masks[name]
            kept = int(mask.count_nonzero())
            fewer, more = self._change(step, name, kept, mask.numel(), fraction)
            drop, grow = exchange_counts(kept, mask.numel(), fraction, fewer, more)
            result[name] = drop_and_grow(weight, mask, drop, grow, draws[name])
        return structure.connections(result)

    def _unit_masks(self) -> dict[str, Tensor]:
        """Plain weight name -> bool per unit."""
        scores = {name: score.detach() for name, score in self._scores.parameters().items()}
        return {name: unit != 0 for name, unit in self._scores.structure.units(scores).items()}

    def _interval(self, step: int) -> int:
        share = EARLY_INTERVAL if 2 * step <= self._total else LATE_INTERVAL
        return max(round(share * self._total), 1)

    def _change(self, step: int, name: str, kept: int, size: int, fraction: float) -> tuple[int, int]:
        """How many units of a layer are dropped, and how many grown, beyond the exchange."""
        return 0, 0


class FlyingBirdPlus(FlyingBird):
    """Flying Bird that becomes sparser while the gap between robust accuracies in training and on the held-out images
    widens, and denser while the latter does not rise.

    The authors look at the held-out loss instead; accuracies are what validation measures here.
    """

    def __init__(self, stage: Stage, seed: int, scores: Scores, engine: Engine, progress: Progress) -> None:
        super().__init__(stage, seed, scores, engine, progress)
        self._budget = {name: int(mask.count_nonzero()) for name, mask in self._unit_masks().items()}
        self._epoch = [0, 0]
        self._history: list[tuple[float, float]] = []
        adapts = range(int(ADAPTS_FROM * self._total) + 1, int(ADAPTS_UNTIL * self._total) + 1)
        self._adapts = adapts
        later = range(adapts.stop, self._total)
        self.settled_step = next((step for step in later if step % self._interval(step) == 0), self._total)

    def count(self, robust_correct: int, images: int) -> None:
        self._epoch = [self._epoch[0] + robust_correct, self._epoch[1] + images]

    def validated(self, robust_accuracy: float) -> None:
        correct, images = self._epoch
        self._history = [*self._history, (correct / images - robust_accuracy, robust_accuracy)][-EPOCHS_COMPARED - 1 :]
        self._epoch = [0, 0]

    def _change(self, step: int, name: str, kept: int, size: int, fraction: float) -> tuple[int, int]:
        if step >= self._adapts.stop:
            budget = self._budget[name]
            return max(kept - budget, 0), max(budget - kept, 0)
        if step < self._adapts.start or len(self._history) <= EPOCHS_COMPARED:
            return 0, 0
        pairs = list(pairwise(self._history))
        widened = sum(after[0] > before[0] for before, after in pairs)
        not_risen = sum(after[1] <= before[1] for before, after in pairs)
        fewer = math.ceil(FEWER * fraction * kept) if 2 * widened >= EPOCHS_COMPARED else 0
        more = math.ceil(MORE * kept) if 2 * not_risen >= EPOCHS_COMPARED else 0
        return min(fewer, kept - 1), min(more, size - kept)

    def state(self) -> dict[str, Tensor]:
        """'dynamic/epoch' -> int64 [2]: correct and all images of the epoch under way; 'dynamic/history' -> float64
        [n, 2]: gap and held-out accuracy of the last epochs; 'dynamic/budget' -> int64 [layers]."""
        return {
            "dynamic/epoch": torch.tensor(self._epoch),
            "dynamic/history": torch.tensor(self._history, dtype=torch.float64).view(-1, 2),
            "dynamic/budget": torch.tensor(list(self._budget.values())),
        }

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        self._epoch = tensors["dynamic/epoch"].tolist()
        self._history = [(gap, accuracy) for gap, accuracy in tensors["dynamic/history"].tolist()]
        self._budget = dict(zip(self._budget, tensors["dynamic/budget"].tolist(), strict=True))


def build_dynamic_masks(stage: Stage, seed: int, scores: Scores, engine: Engine, progress: Progress) -> DynamicMasks:
    """Of the stage's method. Collective."""
    if stage.phase == "gradual":
        return GradualPruning(stage, scores, engine, progress)
    assert stage.phase in FROM_SCRATCH, stage.phase
    kind = FlyingBirdPlus if stage.phase == "flying_bird_plus" else FlyingBird
    return kind(stage, seed, scores, engine, progress)
