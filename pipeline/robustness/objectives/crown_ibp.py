"""Training by sound bounds: interval bound propagation and CROWN-IBP."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.recipe.schedules import ramp_at
from pipeline.robustness.bounds import batch_statistics_of, interval_bounds, linf_box, proved, trace
from pipeline.robustness.objectives.base import Objective, ObjectiveInput, ObjectiveOutput, count_correct


def worst_case_loss(margins: Tensor, y: Tensor) -> Tensor:
    """Mean cross-entropy of the worst logits that margins [n, classes] allow (Wong and Kolter, ICML 2018, theorem 2).

    Each class gets the highest value that logit_j - logit_y may take, and y itself 0: an upper bound of the loss of
    every image in the box.
    """
    return F.cross_entropy(-margins, y)


def certified_training(eps: float, ramp: float, kappa: tuple[float, float], crown: tuple[float, float]) -> Objective:
    """kappa * CE(f(x), y) + (1 - kappa) * CE of the worst case in the Linf ball of radius eps.

    The worst case is that of the margins beta * CROWN-IBP + (1 - beta) * IBP (Zhang et al., ICLR 2020, equations 10 and
    11); beta 0 throughout is plain interval bound propagation (Gowal et al. 2018, equation 13). eps rises from 0 over
    the share `ramp` of the phase, while kappa and beta (`crown`) go from the first to the second of their pair. Counts
    as robust what either bound proves at the eps of the moment.

    The bounds are taken on the bare network in float32, whatever the engine's precision: bfloat16 bounds are not sound.
    BatchNorm normalises them by the clean micro-batch, whose forward the engine does; the loss always contains it, even
    at kappa 0, because ZeRO prepares its reduction of gradients when that forward's gradient arrives.
    """
    graph_of = lru_cache(maxsize=1)(trace)

    def objective(given: ObjectiveInput) -> ObjectiveOutput:
        y = given.y
        with batch_statistics_of(given.network) as statistics:
            clean = given.forward(given.x).float()
        box = linf_box(given.x, ramp_at(0.0, eps, ramp, given.elapsed))
        bounds = interval_bounds(graph_of(given.network), box, statistics)
        margins = best = bounds.interval_margins(y)
        beta = ramp_at(*crown, ramp, given.elapsed)
        if beta > 0:
            linear = bounds.linear_margins(y)
            best = torch.maximum(margins, linear)
            margins = beta * linear + (1.0 - beta) * margins
        natural = ramp_at(*kappa, ramp, given.elapsed)
        loss = natural * F.cross_entropy(clean, y) + (1.0 - natural) * worst_case_loss(margins, y)
        return ObjectiveOutput(loss, count_correct(clean, y), proved(best, y).sum())

    return objective
