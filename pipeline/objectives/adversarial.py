"""Cross-entropy on clean images, and on adversarial ones."""

from __future__ import annotations

from torch.nn import functional as F

from pipeline.attacks import Ball, crafting, pgd
from pipeline.objectives.outcome import Given, Objective, Outcome, count_correct, craft_forward


def clean_training(given: Given) -> Outcome:
    """Empirical risk minimisation: cross-entropy on the images as they are."""
    logits = given.forward(given.x).float()
    return Outcome(F.cross_entropy(logits, given.y), count_correct(logits, given.y), None)


def adversarial_training(ball: Ball, steps: int, step_size: float) -> Objective:
    """Cross-entropy on PGD examples (Madry et al., ICLR 2018, equation 2.1).

    The attack maximises the same loss from a uniform start in the ball. With one step it is fast adversarial training
    (Wong, Rice and Kolter, ICLR 2020, algorithm 3).
    """

    def objective(given: Given) -> Outcome:
        x, y = given.x, given.y
        with crafting(given.network):
            x_adv = pgd(
                craft_forward(given.network, given.autocast),
                x,
                lambda logits: F.cross_entropy(logits, y, reduction="none"),
                ball=ball,
                steps=steps,
                step_size=step_size,
                start=ball.random_start(x, given.keys),
            )
        logits = given.forward(x_adv).float()
        return Outcome(F.cross_entropy(logits, y), None, count_correct(logits, y))

    return objective
