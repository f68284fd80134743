"""Training for randomized smoothing: Gaussian noise augmentation, stability training, and SmoothAdv.

The smoothed classifier returns the class that the network predicts most often for x + N(0, sigma^2 I) (Cohen et al.,
ICML 2019, equation 1); `pipeline.evaluation.measures.randomized_smoothing` certifies its radius. Noisy images are never
clipped to [0, 1]: the certificate assumes the full Gaussian.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.robustness.attacks import L2Ball, pgd
from pipeline.robustness.noise import derived_keys, gaussian_noise
from pipeline.robustness.objectives.base import (
    Objective,
    ObjectiveInput,
    ObjectiveOutput,
    count_correct,
    craft_forward,
)
from pipeline.robustness.objectives.trades import kl_divergence


def _noisy(batch: ObjectiveInput, sigma: float) -> Tensor:
    return batch.x + sigma * gaussian_noise(batch.keys, batch.x.shape[1:])


def noise_training(sigma: float, label_smoothing: float = 0.0) -> Objective:
    """Cross-entropy on noisy images (Cohen et al., ICML 2019, section 3.3)."""

    def objective(batch: ObjectiveInput) -> ObjectiveOutput:
        logits = batch.forward(_noisy(batch, sigma)).float()
        loss = F.cross_entropy(logits, batch.y, label_smoothing=label_smoothing)
        return ObjectiveOutput(loss, None, count_correct(logits, batch.y))

    return objective


def stability_training(sigma: float, beta: float) -> Objective:
    """CE(f(x), y) + beta * mean KL(p(x) || p(x + noise)) (Li et al., NeurIPS 2019, with HYDRA's KL).

    The gradient flows through both sides, and clean and noisy images take separate forwards, as in `trades_training`.
    """

    def objective(batch: ObjectiveInput) -> ObjectiveOutput:
        clean, noisy = batch.forward(batch.x).float(), batch.forward(_noisy(batch, sigma)).float()
        divergence = kl_divergence(clean.log_softmax(dim=1), noisy.log_softmax(dim=1))
        loss = F.cross_entropy(clean, batch.y) + beta * divergence.mean()
        return ObjectiveOutput(loss, count_correct(clean, batch.y), count_correct(noisy, batch.y))

    return objective


def smoothadv_training(
    ball: L2Ball, steps: int, step_size: float, sigma: float, samples: int, label_smoothing: float = 0.0
) -> Objective:
    """Cross-entropy on noisy adversarial examples of the smoothed classifier (Salman et al., NeurIPS 2019, alg. 1).

    The attack starts at x, stays in the ball and in [0, 1], and maximises -log of the probability of y averaged over
    `samples` noise draws (their equation 6). The loss is the mean cross-entropy of the example under the same draws, in
    one forward of n * samples images. An image counts as correct if the averaged probability is highest at y.
    """

    def objective(batch: ObjectiveInput) -> ObjectiveOutput:
        x, y = batch.x, batch.y
        keys = derived_keys(batch.keys, torch.arange(samples, device=x.device))
        noise = sigma * gaussian_noise(keys.flatten(), x.shape[1:]).unflatten(0, (len(x), samples))

        def noisy(images: Tensor) -> Tensor:
            return (images[:, None] + noise).flatten(0, 1)

        def log_average(logits: Tensor) -> Tensor:
            log_p = logits.log_softmax(dim=1).unflatten(0, (len(x), samples))
            return log_p.logsumexp(dim=1) - math.log(samples)

        def attack() -> Tensor:
            logits_of = craft_forward(batch.network, batch.autocast)
            return pgd(
                lambda images: log_average(logits_of(noisy(images))),
                x,
                lambda log_p: F.nll_loss(log_p, y, reduction="none"),
                ball=ball,
                steps=steps,
                step_size=step_size,
                start=x,
            )

        logits = batch.forward(noisy(batch.craft(attack))).float()
        loss = F.cross_entropy(logits, y.repeat_interleave(samples), label_smoothing=label_smoothing)
        return ObjectiveOutput(loss, None, count_correct(log_average(logits.detach()), y))

    return objective
