"""Free adversarial training (Shafahi et al., NeurIPS 2019)."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from pipeline.robustness.attacks import Ball
from pipeline.robustness.objectives.base import Objective, ObjectiveInput, ObjectiveOutput, count_correct


def free_training(ball: Ball, step_size: float) -> Objective:
    """Cross-entropy of x + noise, clipped to [0, 1]; the same backward moves the noise (their algorithm 1).

    One steepest step up the loss, then back into the ball: the noise is ready for the next step, on the same images or
    the next ones. Nothing is crafted, so a step costs what a clean one does, and BatchNorm is in training mode in its
    one forward, whose predictions are the robust count. A pixel that clipping holds at 0 or 1 has no gradient, and
    leaves its noise as it is. Who replays the images is the loop; see `pipeline.training.batches`.
    """

    def objective(given: ObjectiveInput) -> ObjectiveOutput:
        carried = given.noise
        assert carried is not None, "free training carries its noise from step to step"
        noise = carried.detach().requires_grad_(True)
        logits = given.forward((given.x + noise).clamp(0.0, 1.0)).float()

        @torch.no_grad()
        def move() -> None:
            assert noise.grad is not None
            carried.copy_(ball.confine(ball.step(carried, noise.grad, step_size)))

        return ObjectiveOutput(F.cross_entropy(logits, given.y), None, count_correct(logits, given.y), move)

    return objective
