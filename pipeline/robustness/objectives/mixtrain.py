"""MixTrain (Wang et al. 2018): symbolic intervals of a few images, mixed with ordinary training."""

from __future__ import annotations

from functools import lru_cache

from torch.nn import functional as F

from pipeline.recipe.schedules import ramp_at, weight_at
from pipeline.robustness.bounds import batch_statistics_of, linf_box, symbolic_bounds, trace
from pipeline.robustness.noise import uniform_noise
from pipeline.robustness.objectives.base import Objective, ObjectiveInput, ObjectiveOutput, count_correct
from pipeline.robustness.objectives.crown_ibp import worst_case_loss


def mixtrain_training(
    eps: float, ramp: float, samples: int, probability: float, weight: tuple[float, float]
) -> Objective:
    """(CE(f(x), y) + w * CE of the worst case of a few images) / (1 + w), the robust term with `probability` only.

    The two ideas of the paper: stochastic robust approximation, bounds of `samples` images drawn from each micro-batch
    instead of all, and dynamic mixed training, where the balance of the two terms moves as training goes on. Which
    images, and whether, are drawn from the samples' keys. As in HYDRA's use of it, eps rises from 0 over the share
    `ramp` of the phase, and w grows geometrically afterwards, from the first to the second of `weight`. There w
    multiplied the loss of every micro-batch that has it; divided by 1 + w in all of them, they weigh what they did
    against those that have not, and the length stays what SGD, which unlike Adam feels it, was given a learning rate
    for.

    Bounds and BatchNorm are as in `certified_training`. So few images are bounded that they say nothing of the batch:
    no robust count.
    """
    graph_of = lru_cache(maxsize=1)(trace)

    def objective(given: ObjectiveInput) -> ObjectiveOutput:
        with batch_statistics_of(given.network) as statistics:
            clean = given.forward(given.x).float()
        natural = F.cross_entropy(clean, given.y)
        correct = count_correct(clean, given.y)
        order, coin = uniform_noise(given.keys, (2,)).unbind(dim=1)
        w = weight_at(*weight, ramp, given.elapsed)
        if float(coin[0]) >= probability:
            return ObjectiveOutput(natural / (1.0 + w), correct, None)
        chosen = order.topk(min(samples, len(order))).indices
        box = linf_box(given.x[chosen], ramp_at(0.0, eps, ramp, given.elapsed))
        bounds = symbolic_bounds(graph_of(given.network), box, statistics)
        y = given.y[chosen]
        robust = worst_case_loss(bounds.linear_margins(y, parallel=True), y)
        return ObjectiveOutput((natural + w * robust) / (1.0 + w), correct, None)

    return objective
