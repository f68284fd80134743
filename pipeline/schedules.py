"""Learning rates and attack strengths as pure functions of the position in a phase; nothing counts inside itself."""

from __future__ import annotations

import math

from pipeline.recipe_sections import Phase


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


def strength_at(elapsed: float, warmup: float) -> float:
    """Share of its eps that an attack has when `elapsed` (in [0, 1)) of the phase is done: linear from 0 to 1.

    It is 1 from `warmup` (in [0, 1)) on, throughout if that is 0.
    """
    return min(1.0, elapsed / warmup) if warmup else 1.0
