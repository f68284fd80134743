"""Catastrophic overfitting to one-step attacks: how it is told, and what training goes on with.

A network trained on one-step examples may come to withstand just those, while its accuracy under several steps falls to
nothing within an epoch (Wong et al., ICLR 2020, section 5.4; Andriushchenko and Flammarion, NeurIPS 2020). Both
accuracies on the held-out images tell. No torch here.
"""

from __future__ import annotations

import math

STRONGEST = 4
"""The last level: PGD of 16 steps. What overfits to that as well is not this, and stops."""
CHANCE = 2.0
"""Standard errors that the ratio must be below what is allowed, so that a few images do not decide."""


class CatastrophicOverfitting(RuntimeError):
    """The held-out images show it; raised on all ranks, after an epoch, and answered by going back."""

    def __init__(self, stage: str, step: int, level: int, good_step: int | None, right: tuple[int, int]) -> None:
        """`right`: how many held-out images PGD and how many one step leaves right."""
        super().__init__(
            f"{stage}: catastrophic overfitting at step {step}: of the held-out images {right[0]} withstand PGD and "
            f"{right[1]} one step"
        )
        self.step, self.level, self.good_step = step, level, good_step


class StillOverfitting(ValueError):
    """The strongest level overfits too; only another recipe helps."""


def overfits(right_under_pgd: int, right_under_one_step: int, smallest: float) -> bool:
    """Whether so few of the images that withstand one step withstand PGD: fewer than `smallest` of them, by more than
    chance (two standard errors of a binomial count of that share)."""
    allowed = smallest * right_under_one_step
    return right_under_pgd < allowed - CHANCE * math.sqrt(allowed * (1.0 - smallest))


def stronger(level: int, eps: float, step_size: float) -> tuple[int, float]:
    """(steps, step_size) of the PGD that training goes on with at a level of 1 or more: 2^level steps.

    They are as long as before, unless 2.5 eps / steps, which is enough to cross the ball (Madry et al. 2018), is less.
    """
    steps = 2**level
    return steps, min(step_size, 2.5 * eps / steps)
