"""How far the masks of the prune phase have moved: shares of the kept connections, for the rows of metrics.

The masks that the phase began with are made again from its frozen weights. Those of the last row cannot be, so a
checkpoint holds them, a bit per connection. So a row says the same however often the run was interrupted, and on any
number of workers, which all have the same masks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.models.pruning.score_init import FirstScore
from pipeline.models.pruning.scores import first_masks, masks_of

PREFIX = "row_mask/"


@dataclass
class Drift:
    """Measures one network in training."""

    network: nn.Module
    start: Mapping[str, Tensor]
    """Plain weight name -> bool mask, on the network's device."""
    row: Mapping[str, Tensor] | None
    """The masks of the last row, or of the start; None if an older version of the project wrote the checkpoint."""

    @staticmethod
    def begin(
        network: nn.Module, first: FirstScore, carried: Mapping[str, Tensor] | None, device: torch.device
    ) -> Drift:
        """`first` is where the phase's scores begin; `carried` is what the checkpoint has if it goes on from one.

        To be called before the network goes to its device, as its first masks were made before that, too.
        """
        start = {name: mask.to(device) for name, mask in first_masks(network, first).items()}
        if carried is None:
            return Drift(network, start, start)
        if any(PREFIX + name not in carried for name in start):
            return Drift(network, start, None)
        return Drift(network, start, {name: _unpacked(carried[PREFIX + name], mask) for name, mask in start.items()})

    def measured(self) -> dict[str, float | None]:
        """For a row: the share of the connections kept at the start, and of those kept at the last row, that are not
        kept now. As many are kept in their place. One transfer from the device."""
        now = {name: mask.clone() for name, mask in masks_of(self.network).items()}
        counts = [_counts(self.start, now)] + ([_counts(self.row, now)] if self.row is not None else [])
        shares = [gone / kept for gone, kept in torch.stack(counts).tolist()]
        self.row = now
        return {"since_start": shares[0], "since_row": shares[1] if len(shares) > 1 else None}

    def carried(self) -> dict[str, Tensor]:
        """What a checkpoint holds: 'row_mask/<name>' -> uint8, eight connections in each, on the CPU."""
        row = self.row or {}
        bits = {name: np.packbits(mask.cpu().contiguous().numpy()) for name, mask in row.items()}
        return {PREFIX + name: torch.from_numpy(packed) for name, packed in bits.items()}


def _counts(before: Mapping[str, Tensor], now: Mapping[str, Tensor]) -> Tensor:
    """[2]: how many connections of `before` are gone, and how many there were."""
    gone = sum((mask & ~now[name]).sum() for name, mask in before.items())
    return torch.stack([torch.as_tensor(gone), torch.as_tensor(sum(mask.sum() for mask in before.values()))])


def _unpacked(packed: Tensor, like: Tensor) -> Tensor:
    bits = np.unpackbits(packed.numpy(), count=like.numel()).astype(bool)
    return torch.from_numpy(bits).view(like.shape).to(like.device)
