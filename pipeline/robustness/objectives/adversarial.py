"""Cross-entropy on clean images and on adversarial examples."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.robustness.attacks import TINY, Ball, LinfBall, pgd
from pipeline.robustness.noise import uniform_noise
from pipeline.robustness.objectives.base import (
    Objective,
    ObjectiveInput,
    ObjectiveOutput,
    count_correct,
    craft_forward,
)


def clean_training(batch: ObjectiveInput, label_smoothing: float = 0.0) -> ObjectiveOutput:
    """Empirical risk minimisation: cross-entropy on clean images."""
    logits = batch.forward(batch.x).float()
    loss = F.cross_entropy(logits, batch.y, label_smoothing=label_smoothing)
    return ObjectiveOutput(loss, count_correct(logits, batch.y), None)


def adversarial_training(ball: Ball, steps: int, step_size: float, label_smoothing: float = 0.0) -> Objective:
    """Cross-entropy on PGD examples (Madry et al., ICLR 2018, equation 2.1).

    The attack maximises the same loss, without label smoothing, from a uniform start in the ball. With one step, this
    is fast adversarial training (Wong, Rice and Kolter, ICLR 2020, algorithm 3).
    """

    def objective(batch: ObjectiveInput) -> ObjectiveOutput:
        def start() -> Tensor:
            return ball.random_start(batch.x, batch.keys)

        return _loss_under_attack(batch, ball, steps, step_size, start, label_smoothing)

    return objective


def nfgsm_training(ball: LinfBall, step_size: float, magnitude: float, label_smoothing: float = 0.0) -> Objective:
    """Cross-entropy on N-FGSM examples (de Jorge et al., NeurIPS 2022, algorithm 1).

    Uniform noise of up to magnitude * eps per pixel, then one signed step. There is no projection onto the ball, so an
    example may be magnitude * eps + step_size away; noisy image and example are clipped to [0, 1].
    """

    def objective(batch: ObjectiveInput) -> ObjectiveOutput:
        def start() -> Tensor:
            noise = 2.0 * uniform_noise(batch.keys, batch.x.shape[1:]) - 1.0
            return (batch.x + magnitude * ball.eps * noise).clamp_(0.0, 1.0)

        return _loss_under_attack(batch, LinfBall(math.inf), 1, step_size, start, label_smoothing)

    return objective


def fgsm_pgi_training(ball: LinfBall, step_size: float, prior_weight: float, label_smoothing: float = 0.0) -> Objective:
    """Cross-entropy on FGSM-PGI examples, and the squared change of the logits that the attack's step makes.

    The step begins at the perturbation that the image had in its last epoch (Jia et al., ECCV 2022: FGSM-EP with their
    regulariser). CE(f(x_adv)) + prior_weight * mean (f(x_adv) - f(start))^2, over images and classes; the gradient
    flows through both logits. `batch.noise` is the perturbation in units of eps, so that it grows with eps.
    """

    def objective(batch: ObjectiveInput) -> ObjectiveOutput:
        perturbation = batch.noise
        assert perturbation is not None, "FGSM-PGI remembers the perturbations of images"

        def attack() -> Tensor:
            start = ball.project(batch.x + ball.eps * perturbation, batch.x)
            x_adv = _ascend(batch, ball, 1, step_size, start)
            perturbation.copy_((x_adv - batch.x) / max(ball.eps, TINY))  # 0 at an eps of 0
            return torch.cat((start, x_adv))

        start, x_adv = batch.craft(attack).chunk(2)
        at_start, logits = batch.forward(start).float(), batch.forward(x_adv).float()
        loss = F.cross_entropy(logits, batch.y, label_smoothing=label_smoothing)
        loss = loss + prior_weight * F.mse_loss(logits, at_start)
        return ObjectiveOutput(loss, None, count_correct(logits, batch.y))

    return objective


def _loss_under_attack(
    batch: ObjectiveInput,
    ball: Ball,
    steps: int,
    step_size: float,
    start: Callable[[], Tensor],
    label_smoothing: float,
) -> ObjectiveOutput:
    """Cross-entropy on PGD examples; computing `start` counts as part of the attack."""
    logits = batch.forward(batch.craft(lambda: _ascend(batch, ball, steps, step_size, start()))).float()
    loss = F.cross_entropy(logits, batch.y, label_smoothing=label_smoothing)
    return ObjectiveOutput(loss, None, count_correct(logits, batch.y))


def _ascend(batch: ObjectiveInput, ball: Ball, steps: int, step_size: float, start: Tensor) -> Tensor:
    """PGD examples that maximise cross-entropy."""
    return pgd(
        craft_forward(batch.network, batch.autocast),
        batch.x,
        lambda logits: F.cross_entropy(logits, batch.y, reduction="none"),
        ball=ball,
        steps=steps,
        step_size=step_size,
        start=start,
    )
