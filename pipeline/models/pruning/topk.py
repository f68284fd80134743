"""Top-k masks: how many connections are kept, and which ones.

Pure functions of tensors (HYDRA: Sehwag et al., NeurIPS 2020); `pipeline.models.pruning.scores` applies them to
networks.
"""

from __future__ import annotations

import hashlib
import math
from decimal import Decimal
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

NAN = "scores contain NaN; lower the learning rate of the prune phase"


def kept_count(n: int, keep_fraction: Decimal | Fraction) -> int:
    """Number of connections kept of `n`: n - floor((1 - keep_fraction) n), at least 1, in exact arithmetic.

    In floats, (1 - 0.9) * 1000 is 99.99..., which keeps 901.
    Errors: ValueError unless 0 < keep_fraction <= 1.
    """
    if not 0 < keep_fraction <= 1:
        raise ValueError(f"keep_fraction {keep_fraction} must lie in (0, 1]; it is kept / all connections")
    return n - math.floor((1 - Fraction(keep_fraction)) * n)


def kth_largest(values: Tensor, k: int) -> Tensor:
    """The k-th largest (k from 1 to n) of values [n], as a scalar, in linear time. NaN ranks above everything."""
    if values.device.type == "cpu":
        # numpy's partition is vectorised: 0.8 ms for 0.5 M float32 values, where torch's kthvalue takes 8 ms.
        place = values.numel() - k
        return torch.from_numpy(np.partition(values.numpy(), place)[place:]).amin()
    return values.topk(k, sorted=False).values.amin()


def topk_mask(score: Tensor, kept: int) -> Tensor:
    """The `kept` entries of largest |score|, as a bool mask of score's shape; ties go to the lower row-major index.

    Row-major refers to the logical index, so that memory formats and devices agree. Linear time.
    Errors: ValueError for NaN, or a `kept` outside [0, n].
    """
    magnitude = score.detach().abs()
    if not 0 <= kept <= magnitude.numel():
        raise ValueError(f"cannot keep {kept} of {magnitude.numel()} scores")
    # Flattened in memory order, which copies nothing.
    dims = sorted(range(magnitude.dim()), key=magnitude.stride, reverse=True)
    values = magnitude.permute(dims).reshape(-1)
    threshold = kth_largest(values, kept) if kept else values.new_tensor(math.inf)
    mask = magnitude >= threshold
    surplus = int(mask.count_nonzero()) - kept
    if surplus < 0:  # the threshold is NaN, and comparisons with it are false
        raise ValueError(NAN)
    if surplus:
        ties = (magnitude == threshold).nonzero()
        mask[tuple(ties[-surplus:].T)] = False
    return mask


def n_of_m_mask(score: Tensor, n: int, m: int) -> Tensor:
    """The `n` entries of largest |score| of every `m` consecutive ones along dimension 1, as a bool mask.

    Ties go to the lower index. `m` divides the dimension. Errors: ValueError for NaN.
    """
    along = score.detach().abs().movedim(1, -1)
    groups = along.reshape(-1, m).T.contiguous()  # a group per column: comparisons of rows are vectorised
    if bool(groups.isnan().any()):
        raise ValueError(NAN)
    rank = torch.zeros_like(groups, dtype=torch.uint8)
    for place in range(m):  # how many of its group each entry is behind
        rank[:place] += groups[place] > groups[:place]
        rank[place + 1 :] += groups[place] >= groups[place + 1 :]
    return (rank < n).T.reshape(along.shape).movedim(-1, 1)


def masks_sha256(masks: dict[str, Tensor]) -> str:
    """SHA-256 over the names, shapes and bits of a network's masks; independent of memory format."""
    digest = hashlib.sha256()
    for name, mask in sorted(masks.items()):
        digest.update(f"{name} {tuple(mask.shape)}\n".encode())
        digest.update(np.packbits(mask.cpu().contiguous().numpy()).tobytes())
    return digest.hexdigest()
