"""Masks as arithmetic: how many connections are kept, and which ones.

Pure functions of tensors (HYDRA: Sehwag et al., NeurIPS 2020); `pipeline.models.pruning.scores` puts them on networks.
"""

from __future__ import annotations

import math
from decimal import Decimal
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor


def kept_count(n: int, keep_fraction: Decimal) -> int:
    """How many of `n` connections a layer keeps: n - floor((1 - k) n), exact in the decimal as written.

    In floats (1 - 0.9) * 1000 is 99.99..., which keeps 901. At least one connection is kept.
    Errors: ValueError unless 0 < keep_fraction <= 1.
    """
    if not 0 < keep_fraction <= 1:
        raise ValueError(f"keep_fraction {keep_fraction} must lie in (0, 1]; it is kept / all connections")
    return n - math.floor((1 - Fraction(keep_fraction)) * n)


def kth_largest(values: Tensor, k: int) -> Tensor:
    """The k-th largest (k from 1 to n) of values [n], as a scalar; NaN, on top of all others, if there is one.

    Linear time.
    """
    if values.device.type == "cpu":
        # numpy's partition is vectorised: 0.8 ms for 0.5 M float32 values, where torch's kthvalue takes 8 ms.
        place = values.numel() - k
        return torch.from_numpy(np.partition(values.numpy(), place)[place:]).amin()
    return values.topk(k, sorted=False).values.amin()


def topk_mask(score: Tensor, kept: int) -> Tensor:
    """The `kept` entries of largest |score|, as bool of score's shape; among equals the lower row-major index wins.

    Row-major means the logical index, so that memory formats and devices agree. Linear time.
    Errors: ValueError for NaN, or a `kept` outside [0, n].
    """
    magnitude = score.detach().abs()
    if not 0 <= kept <= magnitude.numel():
        raise ValueError(f"cannot keep {kept} of {magnitude.numel()} scores")
    # All values in the order in which they lie in memory, which copies nothing.
    places = sorted(range(magnitude.dim()), key=magnitude.stride, reverse=True)
    values = magnitude.permute(places).reshape(-1)
    threshold = kth_largest(values, kept) if kept else values.new_tensor(math.inf)
    mask = magnitude >= threshold
    surplus = int(mask.count_nonzero()) - kept
    if surplus < 0:  # nothing is as large as NaN
        raise ValueError("scores contain NaN; lower the learning rate of the prune phase")
    if surplus:
        equals = (magnitude == threshold).nonzero()
        mask[tuple(equals[-surplus:].T)] = False
    return mask
