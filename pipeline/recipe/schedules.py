"""Learning rates, image sizes, attack strengths and loss weights as pure functions of the position in a phase."""

from __future__ import annotations

import math
from decimal import Decimal
from fractions import Fraction

from pipeline.recipe.learning_rate import Constant, Cosine, Hydra, OneCycle, Step
from pipeline.recipe.phase import GRAIN, Phase


def lr_at(phase: Phase, step: int, steps_per_epoch: int) -> float:
    """Learning rate of 0-based `step` of a phase.

    Linear warm-up to `lr` over `warmup_epochs`, then the phase's schedule over the other steps; the milestones of
    `step` are fractions of all steps.

    Errors: ValueError for a step outside the phase.
    """
    total = phase.epochs * steps_per_epoch
    warmup = round(phase.warmup_epochs * steps_per_epoch)
    if not 0 <= step < total:
        raise ValueError(f"step {step} is outside the phase's {total} steps")
    if step < warmup:
        return phase.lr * (step + 1) / warmup
    match phase.schedule:
        case Cosine(final_lr_fraction=fraction):
            return _cosine(phase.lr, fraction * phase.lr, step - warmup, total - warmup)
        case Hydra():
            epoch, epochs = (step - warmup) // steps_per_epoch, (total - warmup) / steps_per_epoch
            return phase.lr * 0.5 * (1.0 + math.cos((epoch - 1) / epochs * math.pi))
        case OneCycle(final_lr_fraction=fraction) as cycle:
            peak = cycle.rise * total - 1  # it lies between two steps, unless it is a whole number
            if step <= peak:
                return _cosine(cycle.first_fraction * phase.lr, phase.lr, step, peak)
            return _cosine(phase.lr, fraction * phase.lr, step - peak, total - 1 - peak)
        case Constant():
            return phase.lr
        case Step(milestones=milestones, factor=factor):
            return phase.lr * factor ** sum(step >= round(milestone * total) for milestone in milestones)


def _cosine(start: float, end: float, elapsed: float, steps: float) -> float:
    """Half a period of a cosine, from `start` to `end` once `elapsed` has grown from 0 to `steps`."""
    return end + (start - end) * 0.5 * (1.0 + math.cos(math.pi * elapsed / steps))


def image_size_at(phase: Phase, image_size: int, epoch: int) -> int:
    """Height and width, in pixels, of the training images of a phase's 0-based `epoch`, at most `image_size`.

    Progressive resizing as in ffcv-imagenet (Leclerc et al., CVPR 2023): linear in epochs, rounded to a multiple of 32.
    """
    growth = phase.resolution
    if growth is None or epoch >= growth.full_from:
        return image_size
    elapsed = max(epoch - growth.grows_from, 0) / (growth.full_from - growth.grows_from)
    return min(round((growth.smallest + (image_size - growth.smallest) * elapsed) / GRAIN) * GRAIN, image_size)


def kept_fraction_at(keep_fraction: Decimal, elapsed: Fraction) -> Fraction:
    """Fraction of connections that gradual pruning keeps once `elapsed` (in [0, 1]) of its steps is done, exactly.

    The cubic schedule of Zhu and Gupta (2017, section 3), from dense to `keep_fraction`: sparsity is
    s (1 - (1 - elapsed)^3) for a final sparsity s.
    """
    keep = Fraction(keep_fraction)
    return keep + (1 - keep) * (1 - elapsed) ** 3


LARGEST_DROP, SMALLEST_DROP = 0.5, 0.005
"""Flying Bird: fractions of a layer's connections that are exchanged at the first and last update."""


def drop_fraction_at(elapsed: float) -> float:
    """Fraction of a layer's connections that Flying Bird exchanges once `elapsed` (in [0, 1]) of the stage is done.

    A cosine from LARGEST_DROP to SMALLEST_DROP (Chen et al., ICLR 2022, in the authors' code).
    """
    return SMALLEST_DROP + 0.5 * (LARGEST_DROP - SMALLEST_DROP) * (1.0 + math.cos(math.pi * elapsed))


def strength_at(elapsed: float, warmup: float) -> float:
    """Fraction of the full eps once `elapsed` (in [0, 1)) of the phase is done: linear from 0 to 1 over `warmup`.

    It is 1 from `warmup` (in [0, 1)) on, and throughout if `warmup` is 0.
    """
    return min(1.0, elapsed / warmup) if warmup else 1.0


def ramp_at(start: float, end: float, ramp: float, elapsed: float) -> float:
    """Linear from `start` to `end` over the fraction `ramp` of a phase, then `end`; `elapsed` is the fraction done.

    The schedule of eps and of the loss weights in certified training (Zhang et al., ICLR 2020, section 4).
    """
    return end if elapsed >= ramp else start + (end - start) * elapsed / ramp


FULL_WEIGHT = 0.25
"""MixTrain: fraction of the epochs after the ramp that have the full robust weight (HYDRA: about 10 of 45)."""


def weight_at(start: float, end: float, ramp: float, elapsed: float) -> float:
    """MixTrain's weight of the robust loss: `start` during the ramp of eps, then geometric growth to `end`.

    HYDRA multiplies it by 2.5 every five epochs; here it grows at every step.
    """
    if elapsed < ramp:
        return start
    return start * (end / start) ** ramp_at(0.0, 1.0, (1.0 - ramp) * (1.0 - FULL_WEIGHT), elapsed - ramp)
