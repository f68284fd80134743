"""Catastrophic overfitting to one-step attacks: the detection rule, and the stronger attacks training resumes with.

A network trained on one-step examples may become robust to these only, while its accuracy under multi-step attacks
drops to 0 within an epoch (Wong et al., ICLR 2020, section 5.4; Andriushchenko and Flammarion, NeurIPS 2020).
Comparing both accuracies on the held-out images detects it. Does not import torch.
"""

from __future__ import annotations

from scipy.special import bdtr

STRONGEST = 4
"""The last level, PGD of 16 steps. A network that still overfits has another problem, and training stops."""
SIGNIFICANCE = 0.02
"""How rarely chance alone may give so low a count, so that a few images do not trigger a rollback."""


class CatastrophicOverfitting(RuntimeError):
    """Detected on the held-out images after an epoch; raised on all ranks, and handled by a rollback."""

    def __init__(self, stage: str, step: int, level: int, good_step: int | None, right: tuple[int, int]) -> None:
        """`right`: numbers of held-out images classified correctly under PGD and under the one-step attack."""
        super().__init__(
            f"{stage}: catastrophic overfitting at step {step}: of the held-out images, {right[0]} are robust to PGD "
            f"and {right[1]} to one step"
        )
        self.step, self.level, self.good_step = step, level, good_step


class StillOverfitting(ValueError):
    """Even the strongest level overfits; the recipe must change."""


def overfits(right_under_pgd: int, right_under_one_step: int, smallest: float) -> bool:
    """Whether robust accuracy under PGD is below the fraction `smallest` of that under one step.

    The difference must exceed chance: a binomial count of `right_under_one_step` images with probability `smallest` is
    this low with a probability of at most `SIGNIFICANCE`.
    """
    if right_under_pgd >= smallest * right_under_one_step:
        return False
    return bool(bdtr(right_under_pgd, right_under_one_step, smallest) <= SIGNIFICANCE)


def stronger(level: int, eps: float, step_size: float) -> tuple[int, float]:
    """(steps, step_size) of the PGD attack at a level of 1 or more: 2^level steps.

    The step size is kept, but at most 2.5 eps / steps, which suffices to cross the ball (Madry et al. 2018).
    """
    steps = 2**level
    return steps, min(step_size, 2.5 * eps / steps)
