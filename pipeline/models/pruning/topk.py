"""Top-k masks: how many connections are kept, and which ones.

Pure functions of tensors (HYDRA: Sehwag et al., NeurIPS 2020); `pipeline.models.pruning.scores` applies them to
networks.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
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
    """`topk_masks` of one tensor."""
    (mask,) = topk_masks([score], [kept])
    return mask


def topk_masks(scores: Sequence[Tensor], kept: Sequence[int]) -> list[Tensor]:
    """The `kept` entries of largest |score| of each tensor, as bool masks of the scores' shapes.

    Ties go to the lower row-major index. Row-major refers to the logical index, so that memory formats and devices
    agree. Linear time; the device is waited for once, however many tensors there are, unless some have ties.
    Errors: ScoreError for NaN, or a `kept` outside [0, n].
    """
    masks, thresholds = [], []
    for number, (score, count) in enumerate(zip(scores, kept, strict=True)):
        magnitude = score.detach().abs()
        if not 0 <= count <= magnitude.numel():
            raise ScoreError(f"cannot keep {count} of {magnitude.numel()} scores", number)
        # Flattened in memory order, which copies nothing.
        dims = sorted(range(magnitude.dim()), key=magnitude.stride, reverse=True)
        values = magnitude.permute(dims).reshape(-1)
        thresholds.append(kth_largest(values, count) if count else values.new_tensor(math.inf))
        masks.append(magnitude >= thresholds[-1])
    totals = torch.stack([mask.count_nonzero() for mask in masks]).tolist() if masks else []
    for number, (mask, total, count) in enumerate(zip(masks, totals, kept, strict=True)):
        if total < count:  # the threshold is NaN, and comparisons with it are false
            raise ScoreError(NAN, number)
        if total > count:
            ties = (scores[number].detach().abs() == thresholds[number]).nonzero()
            mask[tuple(ties[count - total :].T)] = False
    return masks


class ScoreError(ValueError):
    """Scores that cannot be ranked: those of tensor `number`."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.number = number


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
