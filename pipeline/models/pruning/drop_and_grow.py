"""Flying Bird's exchange of connections: drop the smallest weights of a layer, grow others at random (Chen et al., ICLR
2022, "Sparsity Winning Twice"). Under a structure, units are exchanged."""

from __future__ import annotations

import math
from decimal import Decimal

import torch
from torch import Tensor, nn

from pipeline.models.pruning.maskable import maskable
from pipeline.models.pruning.score_init import FirstScore
from pipeline.models.pruning.structure import build_structure
from pipeline.models.pruning.topk import topk_mask
from pipeline.recipe.methods import Allocation
from pipeline.recipe.methods import Structure as StructureName


def first_masks(
    network: nn.Module,
    keep_fraction: Decimal,
    allocation: Allocation,
    init: FirstScore,
    structure: StructureName = "unstructured",
) -> FirstScore:
    """Binary scores: 1 where the scores of `init` rank within the budget of `allocation`. The network has none yet."""
    scores = {name: init(name, layer.get_parameter("weight")) for name, layer in maskable(network).items()}
    shapes = {name: score.shape for name, score in scores.items()}
    masks = build_structure(structure, shapes).mask_rule(keep_fraction, allocation)(scores, {})
    return lambda name, weight: masks[name].to(weight)


def exchange_counts(kept: int, size: int, fraction: float, fewer: int = 0, more: int = 0) -> tuple[int, int]:
    """How many of `kept` of `size` connections a layer drops, and how many others it grows.

    ceil(fraction * kept) of each, or as many as there are to grow; plus `fewer` (less than `kept`) that are dropped and
    `more` (at most size - kept) that are grown.
    """
    both = min(math.ceil(fraction * kept), kept - fewer, size - kept - more)
    return both + fewer, both + more


def drop_and_grow(weight: Tensor, mask: Tensor, drop: int, grow: int, draws: Tensor) -> Tensor:
    """The mask without the `drop` connections of smallest |weight|, and with the `grow` pruned ones of largest draw.

    `draws` are in [0, 1]. What has just been dropped is not grown at once. Of equal ones, those of lower row-major
    index are kept, and grown. Errors: ValueError for NaN.
    """
    tiny = torch.finfo(weight.dtype).tiny
    survivors = topk_mask(weight.abs().clamp_min(tiny) * mask, int(mask.count_nonzero()) - drop)
    return survivors | topk_mask(draws.clamp_min(tiny) * ~mask, grow)
