"""How a budget of connections is allocated to layers: from scores to masks, by pure functions of shapes and scores.

Every allocation keeps at least one connection of each layer, so that signal can pass, and an exact total.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from decimal import Decimal
from fractions import Fraction
from functools import partial

import torch
from torch import Tensor

from pipeline.models.pruning.topk import kept_count, kth_largest, topk_mask
from pipeline.recipe.sections import Allocation

MaskRule = Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], dict[str, Tensor]]
"""Scores of every layer, and rates where the allocation is learned -> bool masks of the scores' shapes.

Errors: ValueError for NaN, naming the layer.
"""

LARGEST_RATE = 30.0
"""A layer whose rate is this much above the mean has the budget before the others do; exp must not overflow."""


def mask_rule(shapes: Mapping[str, torch.Size], keep_fraction: Decimal, allocation: Allocation) -> MaskRule:
    """The rule that makes the masks of a network whose weights have `shapes`; it can be pickled."""
    counts = (erdos_renyi_kernel if allocation == "erk" else uniform)(shapes, keep_fraction)
    budget = total_kept(shapes, keep_fraction)
    if allocation == "learned":
        return partial(learned_masks, counts=counts, budget=budget)
    if allocation == "global":
        return partial(_by_scores, partial(global_masks, budget=budget))
    return partial(_by_scores, partial(layer_masks, counts=counts))


def _by_scores(
    make: Callable[[Mapping[str, Tensor]], dict[str, Tensor]], scores: Mapping[str, Tensor], rates: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    assert not rates, "only the learned allocation has rates"
    return make(scores)


def uniform(shapes: Mapping[str, torch.Size], keep_fraction: Decimal) -> dict[str, int]:
    """The same fraction of every layer, as in the paper."""
    return {name: kept_count(shape.numel(), keep_fraction) for name, shape in shapes.items()}


def total_kept(shapes: Mapping[str, torch.Size], keep_fraction: Decimal) -> int:
    """The budget of the allocations that are not uniform: of all connections taken together, one per layer at least."""
    return max(kept_count(sum(shape.numel() for shape in shapes.values()), keep_fraction), len(shapes))


def erdos_renyi_kernel(shapes: Mapping[str, torch.Size], keep_fraction: Decimal) -> dict[str, int]:
    """ERK (Evci et al., ICML 2020, section 3): the density of a layer is proportional to the sum of its dimensions
    over their product, and at most 1; small layers stay denser.

    Fractions are rounded so that the total is exact: the largest remainders are rounded up, ties in order of layers.
    """
    sizes = {name: shape.numel() for name, shape in shapes.items()}
    raw = {name: Fraction(sum(shape), shape.numel()) for name, shape in shapes.items()}
    budget = total_kept(shapes, keep_fraction)
    dense: set[str] = set()
    while True:  # a layer whose share is more than it has stays dense, and the others share what is left
        open_ = [name for name in sizes if name not in dense]
        room = budget - sum(sizes[name] for name in dense)
        scale = room / sum((raw[name] * sizes[name] for name in open_), Fraction(0)) if open_ else Fraction(0)
        over = {name for name in open_ if scale * raw[name] > 1}
        if not over:
            break
        dense |= over
    wanted = {name: Fraction(sizes[name]) if name in dense else scale * raw[name] * sizes[name] for name in sizes}
    return _rounded(wanted, sizes, budget)


def _rounded(wanted: Mapping[str, Fraction], sizes: Mapping[str, int], budget: int) -> dict[str, int]:
    """Whole numbers that sum to `budget`, near `wanted`, each from 1 to the layer's size."""
    counts = {name: min(max(math.floor(value), 1), sizes[name]) for name, value in wanted.items()}
    order = sorted(counts, key=lambda name: math.floor(wanted[name]) - wanted[name])  # largest remainder first; stable
    while (missing := budget - sum(counts.values())) != 0:
        step = 1 if missing > 0 else -1
        for name in order if step > 0 else reversed(order):
            if missing and 1 <= counts[name] + step <= sizes[name]:
                counts[name] += step
                missing -= step
    return counts


def global_masks(scores: Mapping[str, Tensor], budget: int) -> dict[str, Tensor]:
    """The `budget` connections of largest |score| of all layers together, as one bool mask per layer.

    Every layer keeps its strongest connection. Among equals, earlier layers and lower row-major indices win.
    Errors: ValueError for NaN, naming the layer, or a budget that the layers cannot hold.
    """
    strongest = {name: _mask(name, score, 1) for name, score in scores.items()}
    magnitudes = [
        score.detach().abs().masked_fill(strongest[name], math.inf).reshape(-1) for name, score in scores.items()
    ]
    parts = topk_mask(torch.cat(magnitudes), budget).split([part.numel() for part in magnitudes])
    return {name: part.view(score.shape) for (name, score), part in zip(scores.items(), parts, strict=True)}


def learned_masks(
    scores: Mapping[str, Tensor], rates: Mapping[str, Tensor], counts: Mapping[str, int], budget: int
) -> dict[str, Tensor]:
    """The global masks of |s| exp(t) / h, where h is the layer's threshold by the uniform `counts`.

    Layers learn their shares of one budget (the idea of HARP: Zhao and Wressnegger, ICLR 2023, who reach the budget by
    a penalty). With equal rates t all layers have the same threshold: that is the uniform allocation, as near as an
    exact total allows, however far apart the scales of the layers' scores are. A rate that is larger by r keeps what
    is above exp(-r) h. Rates count from their mean, up to LARGEST_RATE.
    """
    mean = torch.stack(list(rates.values())).mean(0)
    importance = {}
    for name, score in scores.items():
        rate = (rates[name] - mean).clamp(-LARGEST_RATE, LARGEST_RATE)
        importance[name] = score / _threshold(score, counts[name]) * rate.exp()
    return global_masks(importance, budget)


def _threshold(score: Tensor, kept: int) -> Tensor:
    magnitude = score.detach().abs().flatten()
    threshold = kth_largest(magnitude, kept)
    # A layer of fewer nonzero scores than it may keep has no threshold; half its digits below its largest is as good.
    limits = torch.finfo(score.dtype)
    return threshold.maximum(magnitude.amax() * limits.eps).clamp_min(limits.tiny)


def layer_masks(scores: Mapping[str, Tensor], counts: Mapping[str, int]) -> dict[str, Tensor]:
    """The top `counts` of each layer on its own. Errors: ValueError for NaN, naming the layer."""
    return {name: _mask(name, score, counts[name]) for name, score in scores.items()}


def _mask(name: str, score: Tensor, kept: int) -> Tensor:
    try:
        return topk_mask(score, kept)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
