"""Multiply-accumulates of a network per image: of convolutions and linear layers, from its coupled channels.

A layer costs positions x kernel area x outputs x inputs of a group. Normalisation, activations and pooling are not
counted, nor are products of two activations, as in attention.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pipeline.models.pruning.channel_removal import Kept
from pipeline.models.pruning.channel_trace import LayerChannels
from pipeline.models.pruning.channels import Channels


class MultiplyAccumulates:
    """Counts what is left of a network when channels go; a count takes some vector operations over all channels."""

    def __init__(self, channels: Channels) -> None:
        layers = list(channels.layers.values())
        self._names = tuple(channels.layers)
        self._outputs = np.concatenate([layer.outputs for layer in layers])
        self._inputs = np.concatenate([layer.inputs for layer in layers])
        # Each group of a convolution is one block of outputs and one of inputs, which follow each other.
        self._output_starts = _starts(layers, [len(layer.outputs) for layer in layers])
        self._input_starts = _starts(layers, [len(layer.inputs) for layer in layers])
        blocks = [layer.conv_groups for layer in layers]
        self._layer_starts = np.cumsum([0, *blocks[:-1]])
        self._factors = np.repeat(np.array([layer.positions * layer.area for layer in layers], np.int64), blocks)

    def by_layer(self, kept: Kept) -> dict[str, int]:
        """Plain weight name -> multiply-accumulates of its layer, with the channels `kept`."""
        return dict(zip(self._names, np.add.reduceat(self._by_block(kept), self._layer_starts).tolist(), strict=True))

    def total(self, kept: Kept) -> int:
        return int(self._by_block(kept).sum())

    def _by_block(self, kept: Kept) -> NDArray[np.int64]:
        counts = kept.astype(np.int64)
        outputs = np.add.reduceat(counts[self._outputs], self._output_starts)
        inputs = np.add.reduceat(counts[self._inputs], self._input_starts)
        return self._factors * outputs * inputs

    def of_channels(self, channels: Channels) -> NDArray[np.int64]:
        """[count + 1]: coupled channel -> the multiply-accumulates that go if it alone is removed."""
        saved = np.zeros(channels.count + 1, np.int64)
        for layer in channels.layers.values():
            factor, groups = layer.positions * layer.area, layer.conv_groups
            np.add.at(saved, layer.outputs, factor * (len(layer.inputs) // groups))
            np.add.at(saved, layer.inputs, factor * (len(layer.outputs) // groups))
            # What both writes and reads the channel is counted twice.
            written, read = (_per_block(ids, groups) for ids in (layer.outputs, layer.inputs))
            for block_and_channel in written.keys() & read.keys():
                saved[block_and_channel[1]] -= factor * written[block_and_channel] * read[block_and_channel]
        return saved


def _starts(layers: list[LayerChannels], lengths: list[int]) -> NDArray[np.int64]:
    sizes = [
        size for layer, n in zip(layers, lengths, strict=True) for size in [n // layer.conv_groups] * layer.conv_groups
    ]
    return np.cumsum([0, *sizes[:-1]])


def _per_block(ids: NDArray[np.int64], groups: int) -> dict[tuple[int, int], int]:
    """(group of the convolution, channel) -> how often the channel is in it."""
    blocks = np.arange(groups).repeat(len(ids) // groups)
    pairs, counts = np.unique(np.stack([blocks, ids]), axis=1, return_counts=True)
    return {(block, channel): count for block, channel, count in zip(*pairs.tolist(), counts.tolist(), strict=True)}
