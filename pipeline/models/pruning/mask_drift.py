"""How far the masks of the prune phase have moved: shares of the kept connections, for the rows of metrics.

The masks that the phase began with are made again from its frozen weights. Those of the last row cannot be, so a
checkpoint holds them, a bit per connection. So a row says the same however often the run was interrupted, and on any
number of workers, which all have the same masks.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from pipeline.models.pruning.score_init import FirstScore
from pipeline.models.pruning.scores import Scores

PREFIX = "row_mask/"


class MaskDrift:
    """Measures the masks of one network in training."""

    prefix = PREFIX

    def __init__(self, scores: Scores, init: FirstScore, device: torch.device) -> None:
        """`init` is where the phase's scores begin; `device` is where the network trains.

        Made before the network goes to its device, because its first masks were made before that, too.
        """
        self._scores = scores
        self.start: Mapping[str, Tensor] = {n: mask.to(device) for n, mask in scores.first_masks(init).items()}
        """Plain weight name -> bool mask, on the network's device."""
        self._row: Mapping[str, Tensor] | None = self.start
        """The masks of the last row, or of the start; None if an older version of the project wrote the checkpoint."""

    def measured(self) -> dict[str, float | None]:
        """For a row: the share of the connections kept at the start, and of those kept at the last row, that are not
        kept now. As many are kept in their place. One transfer from the device."""
        now = {name: mask.clone() for name, mask in self._scores.masks().items()}
        counts = [_counts(self.start, now)] + ([_counts(self._row, now)] if self._row is not None else [])
        shares = [gone / kept for gone, kept in torch.stack(counts).tolist()]
        self._row = now
        return {"since_start": shares[0], "since_row": shares[1] if len(shares) > 1 else None}

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint holds: 'row_mask/<name>' -> uint8, eight connections in each, on the CPU."""
        row = self._row or {}
        bits = {name: np.packbits(mask.cpu().contiguous().numpy()) for name, mask in row.items()}
        return {PREFIX + name: torch.from_numpy(packed) for name, packed in bits.items()}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Continue from what `state` returned, or from a checkpoint that has no masks of its last row."""
        start = self.start.items()
        whole = all(PREFIX + name in tensors for name in self.start)
        self._row = {name: _unpacked(tensors[PREFIX + name], mask) for name, mask in start} if whole else None


def _counts(before: Mapping[str, Tensor], now: Mapping[str, Tensor]) -> Tensor:
    """[2]: how many connections of `before` are gone, and how many there were."""
    gone = sum((mask & ~now[name]).sum() for name, mask in before.items())
    return torch.stack([torch.as_tensor(gone), torch.as_tensor(sum(mask.sum() for mask in before.values()))])


def _unpacked(packed: Tensor, like: Tensor) -> Tensor:
    bits = np.unpackbits(packed.numpy(), count=like.numel()).astype(bool)
    return torch.from_numpy(bits).view(like.shape).to(like.device)
