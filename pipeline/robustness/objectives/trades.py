"""TRADES (Zhang et al., ICML 2019)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.robustness.attacks import Ball, crafting, pgd
from pipeline.robustness.noise import gaussian_noise
from pipeline.robustness.objectives.base import (
    Objective,
    ObjectiveInput,
    ObjectiveOutput,
    count_correct,
    craft_forward,
)

START_SIGMA = 0.001
"""Standard deviation of the start's noise, in pixels (algorithm 1). At x itself the KL has no gradient."""


def kl_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) per sample, in nats: log-probabilities [n, classes] twice -> [n]."""
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(dim=1)


def trades_training(ball: Ball, steps: int, step_size: float, beta: float) -> Objective:
    """CE(f(x), y) + beta * mean KL(p(x) || p(x_adv)), x_adv maximising that KL (equation 5, beta for their 1/lambda).

    The gradient flows through both sides of the KL. The update takes two forwards rather than one of twice the batch:
    BatchNorm then normalises clean and adversarial images each by their own statistics, as the authors' code does, and
    not by those of a mixture that no evaluation ever sees.
    """

    def objective(given: ObjectiveInput) -> ObjectiveOutput:
        x, y = given.x, given.y
        with given.attacking(), crafting(given.network, given.autocast):
            logits_of = craft_forward(given.network, given.autocast)
            with torch.no_grad():
                log_p = logits_of(x).log_softmax(dim=1)
            x_adv = pgd(
                logits_of,
                x,
                lambda logits: kl_divergence(log_p, logits.log_softmax(dim=1)),
                ball=ball,
                steps=steps,
                step_size=step_size,
                start=ball.project(x + START_SIGMA * gaussian_noise(given.keys, x.shape[1:]), x),
            )
        clean, adversarial = given.forward(x).float(), given.forward(x_adv).float()
        divergence = kl_divergence(clean.log_softmax(dim=1), adversarial.log_softmax(dim=1))
        loss = F.cross_entropy(clean, y) + beta * divergence.mean()
        return ObjectiveOutput(loss, count_correct(clean, y), count_correct(adversarial, y))

    return objective
