"""MixTrain (Wang et al. 2018): symbolic intervals of a few images, mixed with standard training."""

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

    It combines the paper's stochastic robust approximation (bounds of `samples` images drawn from each micro-batch
    instead of all) and dynamic mixed training (the balance of the two terms changes during training). Both random
    choices are drawn from the samples' keys. As in HYDRA, eps rises from 0 over the fraction `ramp` of the phase, and w
    then grows geometrically from the first to the second value of `weight`. HYDRA does not divide by 1 + w; dividing
    the loss of every micro-batch keeps the relative weight of those with and without the robust term, and keeps the
    gradient's scale, which matters to SGD's learning rate but not to Adam's.

    Bounds and BatchNorm are as in `certified_training`. Too few images are bounded for a robust count.
    """
    graph_of = lru_cache(maxsize=1)(trace)

    def objective(batch: ObjectiveInput) -> ObjectiveOutput:
        with batch_statistics_of(batch.network) as statistics:
            clean = batch.forward(batch.x).float()
        natural = F.cross_entropy(clean, batch.y)
        correct = count_correct(clean, batch.y)
        order, coin = uniform_noise(batch.keys, (2,)).unbind(dim=1)
        w = weight_at(*weight, ramp, batch.elapsed)
        if float(coin[0]) >= probability:
            return ObjectiveOutput(natural / (1.0 + w), correct, None)
        subset = order.topk(min(samples, len(order))).indices
        box = linf_box(batch.x[subset], ramp_at(0.0, eps, ramp, batch.elapsed))
        bounds = symbolic_bounds(graph_of(batch.network), box, statistics)
        y = batch.y[subset]
        robust = worst_case_loss(bounds.linear_margins(y, parallel=True), y)
        return ObjectiveOutput((natural + w * robust) / (1.0 + w), correct, None)

    return objective
