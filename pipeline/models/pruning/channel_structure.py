"""Channels as the structure that is kept or pruned, under a budget of multiply-accumulates.

The importance of a coupled channel is the sum of |score| over all weights that go with it. A ranking of all channels is
kept up to the largest number with which the network costs at most keep_fraction of its multiply-accumulates, and then
those that still fit: the total is exact to one channel of any group (with `round_to`, to one step), and never above.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from decimal import Decimal
from fractions import Fraction
from functools import cached_property, partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.models.pruning.allocation import MaskRule
from pipeline.models.pruning.channel_removal import Kept, channel_masks, reading_masks
from pipeline.models.pruning.channel_trace import FIXED, Ids
from pipeline.models.pruning.channels import Channels
from pipeline.models.pruning.multiply_accumulates import MultiplyAccumulates
from pipeline.models.pruning.structure import Shapes, Structure
from pipeline.recipe.methods import Allocation

Importance = NDArray[np.float64]
"""[count + 1]: coupled channel -> its importance; of FIXED it means nothing."""


class CoupledChannels(Structure):
    """Coupled channels of a network; what stays whole (`FIXED`) is counted in the budget."""

    def __init__(self, shapes: Shapes, channels: Channels, round_to: int = 1) -> None:
        super().__init__(shapes)
        self.channels = channels
        self._round_to = round_to

    def _own_rule(self, keep_fraction: Decimal | Fraction, allocation: Allocation, exact: bool) -> MaskRule:
        order = {"uniform": _same_fraction_of_each_group, "global": self._by_importance_per_cost}[allocation]
        return partial(self._masks, keep_fraction, order, channel_masks if exact else reading_masks)

    def check_budget(self, keep_fraction: Decimal | Fraction) -> None:
        self.kept_within(keep_fraction, zeros := np.zeros(self.channels.count + 1), zeros)

    def units(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        raise AssertionError("channels are units of several layers at once")

    @cached_property
    def costs(self) -> MultiplyAccumulates:
        return MultiplyAccumulates(self.channels)

    @cached_property
    def _cost_of_each(self) -> NDArray[np.int64]:
        return self.costs.of_channels(self.channels)

    def _by_importance_per_cost(self, importance: Importance, groups: Ids) -> Importance:
        """A channel's share in the importance of those of its group that are at least as important (as LAMP: Lee et
        al., ICLR 2021), per multiply-accumulate that goes with it.

        Scores of different groups are not comparable: the sums themselves, per cost, left one channel of every early
        group, since what large images cost outweighs all differences.
        """
        shares = np.zeros_like(importance)
        order = np.lexsort((-importance, groups))
        for members in np.split(order, np.flatnonzero(np.diff(groups[order])) + 1):
            sums = np.cumsum(importance[members])
            shares[members] = importance[members] / np.maximum(sums, np.finfo(np.float64).tiny)
        return shares / np.maximum(self._cost_of_each, 1)

    def _masks(
        self,
        keep_fraction: Decimal | Fraction,
        order: Callable[[Importance, Ids], Importance],
        masks_of: Callable[[Channels, Kept], dict[str, Tensor]],
        scores: Mapping[str, Tensor],
        rates: Mapping[str, Tensor],
    ) -> dict[str, Tensor]:
        importance = importance_of(self.channels, scores)
        kept = self.kept_within(keep_fraction, importance, order(importance, self.channels.groups))
        masks = masks_of(self.channels, kept)
        return {
            name: masks[name].view(*masks[name].shape, *[1] * (score.dim() - 2)).to(score.device).expand_as(score)
            for name, score in scores.items()
        }

    def kept_within(self, keep_fraction: Decimal | Fraction, importance: Importance, value: Importance) -> Kept:
        """The channels of largest `value` within the budget, and the most important ones of every group.

        Errors: ValueError if the smallest network is above the budget.
        """
        groups = self.channels.groups
        everything = np.ones(len(groups), np.bool_)
        budget = math.floor(Fraction(keep_fraction) * self.costs.total(everything))
        place = _place_in_group(importance, groups)
        value = np.where(place == 0, np.inf, value)
        value[FIXED] = np.nan  # not ranked
        rank = np.argsort(np.argsort(-value, kind="stable"))

        def kept_of(sizes: NDArray[np.int64]) -> Kept:
            kept = place < sizes[groups]
            kept[FIXED] = True
            return kept

        def sizes_of_first(count: int) -> NDArray[np.int64]:
            """Of the ranking's first `count`; each group's is rounded down to its step."""
            return self._rounded(
                np.bincount(groups[(rank < count) & (groups > 0)], minlength=len(self.channels.group_names))
            )

        low, high = len(self.channels.group_names) - 1, self.channels.count
        if (smallest := self.costs.total(kept_of(sizes_of_first(low)))) > budget:
            share, least = smallest / self.costs.total(everything), self._round_to
            raise ValueError(
                f"sparsity.keep_fractions {keep_fraction} with structure channel: the smallest network, with {least} "
                "of every group of channels and what cannot be removed, has "
                f"{share:.2g} of the multiply-accumulates; raise it"
            )
        while low < high:
            middle = (low + high + 1) // 2
            if self.costs.total(kept_of(sizes_of_first(middle))) <= budget:
                low = middle
            else:
                high = middle - 1
        sizes = sizes_of_first(low)
        # What the next of the ranking does not fit into, steps of other groups may.
        following = np.flatnonzero((place == sizes[groups]) & (groups > 0))
        for group in groups[following[np.argsort(rank[following])]]:
            while sizes[group] < self._size_of_each[group]:
                larger = sizes.copy()
                larger[group] = min(sizes[group] + self._step_of_each[group], self._size_of_each[group])
                if self.costs.total(kept_of(larger)) > budget:
                    break
                sizes = larger
        return kept_of(sizes)

    def _rounded(self, sizes: NDArray[np.int64]) -> NDArray[np.int64]:
        """Channels per group, such that its layers have a multiple of `round_to`, or all that they had."""
        step = self._step_of_each
        down = np.maximum(sizes // step * step, step)
        return np.where(sizes >= self._size_of_each, sizes, np.minimum(down, self._size_of_each))

    @cached_property
    def _size_of_each(self) -> NDArray[np.int64]:
        """Group -> its coupled channels."""
        return np.bincount(self.channels.groups[1:], minlength=len(self.channels.group_names))

    @cached_property
    def _step_of_each(self) -> NDArray[np.int64]:
        return self._round_to // np.gcd(self._round_to, self._width_of_each)

    @cached_property
    def _width_of_each(self) -> NDArray[np.int64]:
        """Group -> how many channels of a layer one coupled channel is."""
        widths = [1]
        for group, name in enumerate(self.channels.group_names[1:], 1):
            outputs = self.channels.layers[name].outputs
            widths.append(int((self.channels.groups[outputs] == group).sum() // self._size_of_each[group]) or 1)
        return np.array(widths, np.int64)


def _place_in_group(importance: Importance, groups: Ids) -> NDArray[np.int64]:
    """[count + 1]: 0 for the most important channel of each group, 1 for the next; ties go to lower ids."""
    order = np.lexsort((-importance, groups))
    first = np.searchsorted(groups[order], groups[order])
    place = np.empty(len(groups), np.int64)
    place[order] = np.arange(len(groups)) - first
    return place


def _same_fraction_of_each_group(importance: Importance, groups: Ids) -> Importance:
    """A ranking in which every prefix has about the same fraction of each group."""
    return -(_place_in_group(importance, groups) + 0.5) / np.bincount(groups)[groups]


@torch.no_grad()
def importance_of(channels: Channels, scores: Mapping[str, Tensor]) -> Importance:
    """The sum of |score| over all weights that go with each coupled channel; in one order on every device.

    One transfer from the device. Errors: ValueError naming a layer whose scores are NaN.
    """
    sums = []
    for name, layer in channels.layers.items():
        score = scores[name].abs().double()
        magnitude = _fold(score.flatten(2)) if score.dim() > 2 else score
        sums.append(_fold(magnitude))
        if layer.inside.any():  # counted once
            magnitude = magnitude.masked_fill(torch.from_numpy(layer.inside).to(magnitude.device), 0.0)
        sums.append(_fold(magnitude.view(layer.conv_groups, -1, magnitude.shape[1]).transpose(1, 2)).reshape(-1))
    ids = np.concatenate([part for layer in channels.layers.values() for part in (layer.outputs, layer.inputs)])
    values = torch.cat(sums).cpu().numpy()
    if np.isnan(values).any():
        name = next(name for name, score in scores.items() if score.isnan().any())
        raise ValueError(f"{name}: scores contain NaN; lower the learning rate of the prune phase")
    return np.bincount(ids, values, minlength=channels.count + 1).astype(np.float64)


def _fold(values: Tensor) -> Tensor:
    """Sums over the last dimension, by halves: in one order, whatever the device and the number of threads."""
    while (size := values.shape[-1]) > 1:
        half = size // 2
        folded = values[..., :half] + values[..., half : 2 * half]
        values = torch.cat([folded, values[..., 2 * half :]], -1) if size % 2 else folded
    return values.squeeze(-1)
