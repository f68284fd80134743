"""TRADES (Zhang et al., ICML 2019)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.robustness.attacks import Ball, pgd
from pipeline.robustness.noise import gaussian_noise
from pipeline.robustness.objectives.base import (
    Objective,
    ObjectiveInput,
    ObjectiveOutput,
    count_correct,
    craft_forward,
)

START_SIGMA = 0.001
"""Standard deviation of the noise at the start, in pixel units (algorithm 1). At x itself the KL has zero gradient."""


def kl_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) per sample, in nats: two tensors of log-probabilities [n, classes] -> [n]."""
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(dim=1)


def trades_training(ball: Ball, steps: int, step_size: float, beta: float) -> Objective:
    """CE(f(x), y) + beta * mean KL(p(x) || p(x_adv)), x_adv maximising that KL (equation 5, beta for their 1/lambda).

    The gradient flows through both sides of the KL. The update uses two forwards instead of one of twice the batch:
    BatchNorm then normalises clean and adversarial images by their own statistics, as the authors' code does, and not
    by those of a mixture that never occurs at test time.
    """

    def objective(batch: ObjectiveInput) -> ObjectiveOutput:
        x, y = batch.x, batch.y

        def attack() -> Tensor:
            logits_of = craft_forward(batch.network, batch.autocast)
            with torch.no_grad():
                log_p = logits_of(x).log_softmax(dim=1)
            return pgd(
                logits_of,
                x,
                lambda logits: kl_divergence(log_p, logits.log_softmax(dim=1)),
                ball=ball,
                steps=steps,
                step_size=step_size,
                start=ball.project(x + START_SIGMA * gaussian_noise(batch.keys, x.shape[1:]), x),
            )

        x_adv = batch.craft(attack)
        clean, adversarial = batch.forward(x).float(), batch.forward(x_adv).float()
        divergence = kl_divergence(clean.log_softmax(dim=1), adversarial.log_softmax(dim=1))
        loss = F.cross_entropy(clean, y) + beta * divergence.mean()
        return ObjectiveOutput(loss, count_correct(clean, y), count_correct(adversarial, y))

    return objective
