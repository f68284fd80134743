"""Coupled channels of a network: which of its layers' inputs and outputs can only be removed together.

They are found by following channels through one forward pass (`channel_trace`) of a copy without data (torch's meta
device).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from pipeline.models.pruning.channel_trace import FIXED, Ids, LayerChannels, Trace, Union
from pipeline.models.pruning.maskable import backbone_of, maskable


@dataclass(frozen=True)
class Channels:
    """The coupled channels of a network, with ids from 1 to `count`; id FIXED (0) is what stays."""

    layers: Mapping[str, LayerChannels]
    """Plain weight name -> its channels, for every maskable layer."""
    norms: Mapping[str, Ids]
    """Name of a BatchNorm -> [num_features] ids."""
    groups: Ids
    """[count + 1]: id -> its group; a group is what layers with tied outputs produce. Group 0 is FIXED's."""
    group_names: tuple[str, ...]
    """Group -> the first weight that produces it; group 0 is named ''."""

    @property
    def count(self) -> int:
        return len(self.groups) - 1


def find_channels(network: nn.Module, image_size: int) -> Channels:
    """The coupled channels of a network without scores, for images of `image_size` pixels.

    The network is left alone. Errors: as `maskable`; RuntimeError if the network rejects such images.
    """
    backbone = backbone_of(network)
    layers = maskable(backbone)
    without_data = _on_meta(backbone)
    trace = Trace(without_data)
    images = torch.empty(1, 3, image_size, image_size, device="meta")
    with torch.no_grad(), trace:
        logits = without_data(images)
    trace.fix(logits)
    return _numbered(trace, layers)


def _on_meta(backbone: nn.Module) -> nn.Module:
    """A copy in eval mode whose tensors have shapes only."""
    memo: dict[int, Any] = {}
    for tensor in [*backbone.parameters(), *backbone.buffers()]:
        empty = torch.empty_like(tensor, device="meta")
        memo[id(tensor)] = nn.Parameter(empty) if isinstance(tensor, nn.Parameter) else empty
    return copy.deepcopy(backbone, memo).eval()


def _numbered(trace: Trace, layers: Mapping[str, nn.Module]) -> Channels:
    """Ids from 1 on, in the order in which layers are used; `layers` that the network does not use stay."""
    outputs = {name: trace.union.roots(layer.outputs) for name, layer in trace.layers.items()}
    number: dict[int, int] = {FIXED: FIXED}
    producer = [""]
    for name, roots in outputs.items():
        for root in roots.tolist():
            if root not in number:
                number[root] = len(number)
                producer.append(name)

    def numbered(ids: Ids) -> Ids:
        return np.array([number[root] for root in trace.union.roots(ids).tolist()], np.int64)

    used = {
        name: replace(layer, outputs=numbered(layer.outputs), inputs=numbered(layer.inputs))
        for name, layer in trace.layers.items()
    }
    norms = {name: numbered(ids) for name, ids in trace.norms.items()}
    groups, names = _groups([layer.outputs for layer in used.values()], producer)
    return Channels({name: used.get(name) or _unused(layer) for name, layer in layers.items()}, norms, groups, names)


def _groups(outputs: list[Ids], producer: list[str]) -> tuple[Ids, tuple[str, ...]]:
    """The group of each channel: layers that share one are of one group; and the groups' names."""
    together = Union()
    together.fresh(len(producer) - 1)
    for ids in outputs:
        if len(free := ids[ids != FIXED]):
            together.tie(free, free[:1])
    number = {FIXED: FIXED}
    names = [""]
    roots = together.roots(np.arange(len(producer))).tolist()
    for channel, root in enumerate(roots):
        if root not in number:
            number[root] = len(names)
            names.append(producer[channel])
    return np.array([number[root] for root in roots], np.int64), tuple(names)


def _unused(layer: nn.Module) -> LayerChannels:
    weight = layer.get_parameter("weight")
    groups = layer.groups if isinstance(layer, nn.Conv2d) else 1
    zeros = np.zeros(max(weight.shape[0], weight.shape[1] * groups), np.int64)
    area = weight.shape[2:].numel()
    return LayerChannels(zeros[: weight.shape[0]], zeros[: weight.shape[1] * groups], groups, False, area, 0)
