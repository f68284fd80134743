"""Free adversarial training (Shafahi et al., NeurIPS 2019)."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from pipeline.robustness.attacks import Ball
from pipeline.robustness.objectives.base import Objective, ObjectiveInput, ObjectiveOutput, count_correct


def free_training(ball: Ball, step_size: float, label_smoothing: float = 0.0) -> Objective:
    """Cross-entropy of x + noise, clipped to [0, 1]; the same backward updates the noise (their algorithm 1).

    The noise takes one step of steepest ascent, is projected onto the ball and is used in the next step, on the same
    images or the next ones. There is no separate attack, so a step costs as much as a clean one; BatchNorm is in
    training mode in its only forward, whose predictions give the robust count. A pixel clipped to 0 or 1 has no
    gradient, so its noise does not change. The training loop replays the images; see `pipeline.training.batches`.
    """

    def objective(batch: ObjectiveInput) -> ObjectiveOutput:
        perturbation = batch.noise
        assert perturbation is not None, "free training carries its noise from step to step"
        noise = perturbation.detach().requires_grad_(True)
        logits = batch.forward((batch.x + noise).clamp(0.0, 1.0)).float()

        @torch.no_grad()
        def update_noise() -> None:
            assert noise.grad is not None
            perturbation.copy_(ball.confine(ball.step(perturbation, noise.grad, step_size)))

        loss = F.cross_entropy(logits, batch.y, label_smoothing=label_smoothing)
        return ObjectiveOutput(loss, None, count_correct(logits, batch.y), update_noise)

    return objective
