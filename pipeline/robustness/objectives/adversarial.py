"""Cross-entropy on clean images, and on adversarial ones."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F

from pipeline.robustness.attacks import Ball, LinfBall, crafting, pgd
from pipeline.robustness.noise import uniform_noise
from pipeline.robustness.objectives.base import (
    Objective,
    ObjectiveInput,
    ObjectiveOutput,
    count_correct,
    craft_forward,
)


def clean_training(given: ObjectiveInput) -> ObjectiveOutput:
    """Empirical risk minimisation: cross-entropy on the images as they are."""
    logits = given.forward(given.x).float()
    return ObjectiveOutput(F.cross_entropy(logits, given.y), count_correct(logits, given.y), None)


def adversarial_training(ball: Ball, steps: int, step_size: float) -> Objective:
    """Cross-entropy on PGD examples (Madry et al., ICLR 2018, equation 2.1).

    The attack maximises the same loss from a uniform start in the ball. With one step it is fast adversarial training
    (Wong, Rice and Kolter, ICLR 2020, algorithm 3).
    """

    def objective(given: ObjectiveInput) -> ObjectiveOutput:
        return _attacked(given, ball, steps, step_size, lambda: ball.random_start(given.x, given.keys))

    return objective


def nfgsm_training(ball: LinfBall, step_size: float, magnitude: float) -> Objective:
    """Cross-entropy on N-FGSM examples (de Jorge et al., NeurIPS 2022, algorithm 1).

    Uniform noise of up to magnitude * eps per pixel, then one signed step. Nothing is projected onto the ball, so an
    example may lie magnitude * eps + step_size away; noisy image and example are clipped to [0, 1].
    """

    def objective(given: ObjectiveInput) -> ObjectiveOutput:
        def start() -> Tensor:
            noise = 2.0 * uniform_noise(given.keys, given.x.shape[1:]) - 1.0
            return (given.x + magnitude * ball.eps * noise).clamp_(0.0, 1.0)

        return _attacked(given, LinfBall(math.inf), 1, step_size, start)

    return objective


def _attacked(
    given: ObjectiveInput, ball: Ball, steps: int, step_size: float, start: Callable[[], Tensor]
) -> ObjectiveOutput:
    """Cross-entropy on what PGD makes of the start, which is part of the attack."""
    y = given.y
    with given.attacking(), crafting(given.network, given.autocast):
        x_adv = pgd(
            craft_forward(given.network, given.autocast),
            given.x,
            lambda logits: F.cross_entropy(logits, y, reduction="none"),
            ball=ball,
            steps=steps,
            step_size=step_size,
            start=start(),
        )
    logits = given.forward(x_adv).float()
    return ObjectiveOutput(F.cross_entropy(logits, y), None, count_correct(logits, y))
