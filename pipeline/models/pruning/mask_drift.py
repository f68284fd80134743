"""Mask drift in the prune phase: the share of kept connections that changed, for the metrics rows.

The initial masks are recomputed from the phase's frozen weights. Those of the last row cannot be recomputed, so a
checkpoint holds them, one bit per connection. Rows therefore depend neither on interruptions nor on the number of
workers, which all have the same masks.
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
    """Tracks the masks of one network during training."""

    prefix = PREFIX

    def __init__(self, scores: Scores, init: FirstScore, device: torch.device) -> None:
        """`init` gives the phase's initial scores; `device` is where the network trains.

        Construct it before the network moves to its device, because the initial masks were computed before that too.
        """
        self._scores = scores
        self.start: Mapping[str, Tensor] = {n: mask.to(device) for n, mask in scores.first_masks(init).items()}
        """Plain weight name -> bool mask, on the network's device."""
        self._row: Mapping[str, Tensor] | None = self.start
        """The masks of the last row, or the initial ones; None after loading a checkpoint that has none."""

    def measured(self) -> dict[str, float | None]:
        """For a metrics row: the share of connections kept at the start, and at the last row, that are now pruned.

        As many others replace them. One transfer from the device.
        """
        now = {name: mask.clone() for name, mask in self._scores.masks().items()}
        counts = [_counts(self.start, now)] + ([_counts(self._row, now)] if self._row is not None else [])
        shares = [dropped / kept for dropped, kept in torch.stack(counts).tolist()]
        self._row = now
        return {"since_start": shares[0], "since_row": shares[1] if len(shares) > 1 else None}

    def state(self) -> dict[str, Tensor]:
        """Checkpoint tensors: 'row_mask/<name>' -> uint8 on the CPU, eight connections per byte."""
        row = self._row or {}
        bits = {name: np.packbits(mask.cpu().contiguous().numpy()) for name, mask in row.items()}
        return {PREFIX + name: torch.from_numpy(packed) for name, packed in bits.items()}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Resume from what `state` returned, or from a checkpoint without last-row masks."""
        start = self.start.items()
        complete = all(PREFIX + name in tensors for name in self.start)
        self._row = {name: _unpack(tensors[PREFIX + name], mask) for name, mask in start} if complete else None


def _counts(before: Mapping[str, Tensor], now: Mapping[str, Tensor]) -> Tensor:
    """[2]: how many connections of `before` are pruned in `now`, and how many there were."""
    dropped = sum((mask & ~now[name]).sum() for name, mask in before.items())
    return torch.stack([torch.as_tensor(dropped), torch.as_tensor(sum(mask.sum() for mask in before.values()))])


def _unpack(packed: Tensor, like: Tensor) -> Tensor:
    bits = np.unpackbits(packed.numpy(), count=like.numel()).astype(bool)
    return torch.from_numpy(bits).view(like.shape).to(like.device)
