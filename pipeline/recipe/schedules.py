"""Learning rates, attack strengths and mixtures as pure functions of the position in a phase."""

from __future__ import annotations

import math

from pipeline.recipe.sections import GRAIN, Phase


def lr_at(phase: Phase, step: int, steps_per_epoch: int) -> float:
    """Learning rate of 0-based `step` of a phase.

    Linear warm-up to `lr` over `warmup_epochs`, then a cosine that reaches zero after the last step of the epochs that
    are really run (the reference code binds the length to nominal epochs and so hardly anneals on ImageNet).
    """
    total = phase.epochs * steps_per_epoch
    warmup = round(phase.warmup_epochs * steps_per_epoch)
    if not 0 <= step < total:
        raise ValueError(f"step {step} is outside the phase's {total} steps")
    if step < warmup:
        return phase.lr * (step + 1) / warmup
    if phase.schedule == "constant":
        return phase.lr
    return phase.lr * 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / (total - warmup)))


def image_size_at(phase: Phase, image_size: int, epoch: int) -> int:
    """Height and width, in pixels, of the training images of a phase's 0-based `epoch`, at most `image_size`.

    Linear in epochs between the two ends and rounded to a multiple of 32, as ffcv-imagenet has it (Leclerc et al.,
    CVPR 2023; progressive resizing).
    """
    growth = phase.resolution
    if growth is None or epoch >= growth.full_from:
        return image_size
    elapsed = max(epoch - growth.grows_from, 0) / (growth.full_from - growth.grows_from)
    return min(round((growth.smallest + (image_size - growth.smallest) * elapsed) / GRAIN) * GRAIN, image_size)


def strength_at(elapsed: float, warmup: float) -> float:
    """Share of its eps that an attack has when `elapsed` (in [0, 1)) of the phase is done: linear from 0 to 1.

    It is 1 from `warmup` (in [0, 1)) on, throughout if that is 0.
    """
    return min(1.0, elapsed / warmup) if warmup else 1.0


def ramp_at(start: float, end: float, ramp: float, elapsed: float) -> float:
    """From `start` to `end` linearly over the share `ramp` of a phase, then `end`; `elapsed` is the share that is done.

    eps and the mixing of certified training go by it (Zhang et al., ICLR 2020, section 4).
    """
    return end if elapsed >= ramp else start + (end - start) * elapsed / ramp


WHOLE = 0.25
"""MixTrain: share of what is left after the ramp that has the whole robust weight (HYDRA: about 10 of 45 epochs)."""


def weight_at(start: float, end: float, ramp: float, elapsed: float) -> float:
    """MixTrain's weight of the robust loss: `start` over the ramp of eps, then geometric growth to `end`.

    HYDRA multiplies it by 2.5 every five epochs; here it grows at every step, at the rate that gets to `end`.
    """
    if elapsed < ramp:
        return start
    return start * (end / start) ** ramp_at(0.0, 1.0, (1.0 - ramp) * (1.0 - WHOLE), elapsed - ramp)
