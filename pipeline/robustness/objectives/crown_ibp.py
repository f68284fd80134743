"""Certified training: interval bound propagation (IBP) and CROWN-IBP."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.recipe.schedules import ramp_at
from pipeline.robustness.bounds import batch_statistics_of, interval_bounds, linf_box, proved, trace
from pipeline.robustness.objectives.base import Objective, ObjectiveInput, ObjectiveOutput, count_correct


def worst_case_loss(margins: Tensor, y: Tensor) -> Tensor:
    """Mean cross-entropy of the worst-case logits of margins [n, classes] (Wong and Kolter, ICML 2018, theorem 2).

    The logit of class j is the upper bound of logit_j - logit_y, 0 for y itself: an upper bound of the loss of every
    image in the box.
    """
    return F.cross_entropy(-margins, y)


def certified_training(eps: float, ramp: float, kappa: tuple[float, float], crown: tuple[float, float]) -> Objective:
    """kappa * CE(f(x), y) + (1 - kappa) * CE of the worst case in the Linf ball of radius eps.

    The worst case is that of the margins beta * CROWN-IBP + (1 - beta) * IBP (Zhang et al., ICLR 2020, equations 10 and
    11); beta 0 throughout is plain interval bound propagation (Gowal et al. 2018, equation 13). eps rises from 0 over
    the fraction `ramp` of the phase, while kappa and beta (`crown`) move from the first to the second value of their
    pair. An image counts as robust if either bound proves it at the current eps.

    Bounds are computed on the bare network in float32, whatever the engine's precision: bfloat16 bounds are not sound.
    BatchNorm normalises them by the statistics of the clean micro-batch, whose forward runs through the engine; the
    loss always includes that forward, even at kappa 0, because ZeRO sets up gradient reduction in its backward.
    """
    graph_of = lru_cache(maxsize=1)(trace)

    def objective(batch: ObjectiveInput) -> ObjectiveOutput:
        y = batch.y
        with batch_statistics_of(batch.network) as statistics:
            clean = batch.forward(batch.x).float()
        box = linf_box(batch.x, ramp_at(0.0, eps, ramp, batch.elapsed))
        bounds = interval_bounds(graph_of(batch.network), box, statistics)
        margins = tightest = bounds.interval_margins(y)
        beta = ramp_at(*crown, ramp, batch.elapsed)
        if beta > 0:
            linear = bounds.linear_margins(y)
            tightest = torch.maximum(margins, linear)
            margins = beta * linear + (1.0 - beta) * margins
        natural = ramp_at(*kappa, ramp, batch.elapsed)
        loss = natural * F.cross_entropy(clean, y) + (1.0 - natural) * worst_case_loss(margins, y)
        return ObjectiveOutput(loss, count_correct(clean, y), proved(tightest, y).sum())

    return objective
