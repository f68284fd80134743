"""Allocates a budget of connections to layers: from scores to masks, as pure functions of shapes and scores.

Every allocation keeps at least one connection per layer, so that signal can pass, and an exact total.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from decimal import Decimal
from fractions import Fraction
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pipeline.models.pruning.harp import floor_of, shares
from pipeline.models.pruning.topk import kept_count, kth_largest, topk_mask
from pipeline.recipe.methods import Allocation

MaskRule = Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], dict[str, Tensor]]
"""Scores per layer, and rates if the allocation is learned -> bool masks of the scores' shapes.

Errors: ValueError for NaN, naming the layer.
"""

LARGEST_RATE = 30.0
"""Bound on |rate - mean rate|, so that exp does not overflow; such a layer already takes the budget first."""


def mask_rule(
    shapes: Mapping[str, torch.Size],
    keep_fraction: Decimal | Fraction,
    allocation: Allocation,
    units: Mapping[str, torch.Size] | None = None,
    exact: bool = True,
) -> MaskRule:
    """The mask rule of layers whose weights have `shapes`; picklable.

    Its scores and masks have the shapes of `units`, by default those of the weights: what is said below of connections
    holds for units. Its masks keep the budget exactly, unless `exact` is false: then HARP's layers have their shares.
    """
    units = units or shapes
    counts = erdos_renyi_kernel(shapes, keep_fraction, units) if allocation == "erk" else uniform(units, keep_fraction)
    budget = total_kept(units, keep_fraction)
    if allocation == "harp":
        return partial(harp_masks, floor=floor_of(keep_fraction), budget=budget if exact else None)
    if allocation == "learned":
        return partial(learned_masks, counts=counts, budget=budget)
    if allocation == "global":
        return partial(_by_scores, partial(global_masks, budget=budget))
    return partial(_by_scores, partial(layer_masks, counts=counts))


def _by_scores(
    make: Callable[[Mapping[str, Tensor]], dict[str, Tensor]], scores: Mapping[str, Tensor], rates: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    assert not rates, "only learned allocations have rates"
    return make(scores)


def binary_masks(scores: Mapping[str, Tensor], rates: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of scores that are the masks: what is not 0 stays."""
    return {name: score != 0 for name, score in scores.items()}


def uniform(shapes: Mapping[str, torch.Size], keep_fraction: Decimal | Fraction) -> dict[str, int]:
    """Connections kept per layer: the same fraction of each, as in the paper."""
    return {name: kept_count(shape.numel(), keep_fraction) for name, shape in shapes.items()}


def total_kept(shapes: Mapping[str, torch.Size], keep_fraction: Decimal | Fraction) -> int:
    """The budget of the non-uniform allocations: keep_fraction of all connections, at least one per layer."""
    return max(kept_count(sum(shape.numel() for shape in shapes.values()), keep_fraction), len(shapes))


def erdos_renyi_kernel(
    shapes: Mapping[str, torch.Size],
    keep_fraction: Decimal | Fraction,
    units: Mapping[str, torch.Size] | None = None,
) -> dict[str, int]:
    """ERK (Evci et al., ICML 2020, section 3): the density of a layer is proportional to the sum of its dimensions
    over their product, at most 1; small layers stay denser. Counts are of `units`, as in `mask_rule`.
    """
    units = units or shapes
    sizes = {name: shape.numel() for name, shape in units.items()}
    densities = {name: Fraction(sum(shape), shape.numel()) for name, shape in shapes.items()}
    return _proportional(densities, sizes, total_kept(units, keep_fraction))


def _proportional(raw: Mapping[str, Fraction], sizes: Mapping[str, int], budget: int) -> dict[str, int]:
    """Connections kept per layer: densities proportional to `raw`, at most 1, that sum to `budget`.

    Counts are rounded by largest remainder, so that the total is exact; ties go to earlier layers.
    """
    dense: set[str] = set()
    while True:  # a layer whose share exceeds its size stays dense, and the others share the rest
        sparse = [name for name in sizes if name not in dense]
        room = budget - sum(sizes[name] for name in dense)
        scale = room / sum((raw[name] * sizes[name] for name in sparse), Fraction(0)) if sparse else Fraction(0)
        over = {name for name in sparse if scale * raw[name] > 1}
        if not over:
            break
        dense |= over
    targets = {name: Fraction(sizes[name]) if name in dense else scale * raw[name] * sizes[name] for name in sizes}
    return _round_to_budget(targets, sizes, budget)


def _round_to_budget(targets: Mapping[str, Fraction], sizes: Mapping[str, int], budget: int) -> dict[str, int]:
    """Integers close to `targets` that sum to `budget`, each between 1 and the layer's size."""
    counts = {name: min(max(math.floor(value), 1), sizes[name]) for name, value in targets.items()}
    order = sorted(
        counts, key=lambda name: math.floor(targets[name]) - targets[name]
    )  # largest remainder first; stable
    while (missing := budget - sum(counts.values())) != 0:
        step = 1 if missing > 0 else -1
        for name in order if step > 0 else reversed(order):
            if missing and 1 <= counts[name] + step <= sizes[name]:
                counts[name] += step
                missing -= step
    return counts


def global_masks(scores: Mapping[str, Tensor], budget: int) -> dict[str, Tensor]:
    """The `budget` connections of largest |score| across all layers, as one bool mask per layer.

    Every layer keeps its strongest connection. Ties go to earlier layers and lower row-major indices.
    Errors: ValueError for NaN, naming the layer, or a budget larger than the layers.
    """
    strongest = {name: named(name, topk_mask, score, 1) for name, score in scores.items()}
    magnitudes = [
        score.detach().abs().masked_fill(strongest[name], math.inf).reshape(-1) for name, score in scores.items()
    ]
    parts = topk_mask(torch.cat(magnitudes), budget).split([part.numel() for part in magnitudes])
    return {name: part.view(score.shape) for (name, score), part in zip(scores.items(), parts, strict=True)}


def learned_masks(
    scores: Mapping[str, Tensor], rates: Mapping[str, Tensor], counts: Mapping[str, int], budget: int
) -> dict[str, Tensor]:
    """The global masks of |s| exp(t) / h, where h is the layer's threshold at the uniform `counts`.

    Layers learn their shares of one budget (the idea of HARP: Zhao and Wressnegger, ICLR 2023, who enforce the budget
    by a penalty). With equal rates t, all layers have the same threshold: this is the uniform allocation, as close as
    an exact total allows, whatever the scales of the layers' scores. Raising a layer's rate by r lowers its threshold
    to exp(-r) h. Rates are relative to their mean and clamped to LARGEST_RATE.
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
    # With fewer nonzero scores than `kept` the threshold is 0; eps times the largest |score| replaces it.
    limits = torch.finfo(score.dtype)
    return threshold.maximum(magnitude.amax() * limits.eps).clamp_min(limits.tiny)


def harp_masks(
    scores: Mapping[str, Tensor], rates: Mapping[str, Tensor], floor: float, budget: int | None
) -> dict[str, Tensor]:
    """The largest |score| of each layer: as many as its share (see `harp`) or, with a `budget`, in proportion to it.

    A share r of n connections is n - floor((1 - r) n) of them, as in the authors' code. Their total is not exact, so a
    finished network has all shares multiplied by one factor, with which they keep the budget.
    """
    kept, sizes = shares(rates, floor), {name: score.numel() for name, score in scores.items()}
    if budget is None:
        counts = {name: size - math.floor((1.0 - kept[name]) * size) for name, size in sizes.items()}
    else:
        counts = _proportional({name: Fraction(share) for name, share in kept.items()}, sizes, budget)
    return layer_masks(scores, counts)


def layer_masks(scores: Mapping[str, Tensor], counts: Mapping[str, int]) -> dict[str, Tensor]:
    """The `counts` largest |score| of each layer separately. Errors: ValueError for NaN, naming the layer."""
    return {name: named(name, topk_mask, score, counts[name]) for name, score in scores.items()}


def named(name: str, make: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """The mask that `make` returns. Errors: those of `make`, naming the layer."""
    try:
        return make(*arguments)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
