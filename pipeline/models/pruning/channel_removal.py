"""Removes channels from a finished network: a smaller plain network with the same logits, to rounding."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pipeline.models.network import Network
from pipeline.models.pruning.channel_trace import FIXED, LayerChannels
from pipeline.models.pruning.channels import Channels
from pipeline.models.pruning.maskable import backbone_of

Kept = NDArray[np.bool_]
"""[count + 1]: coupled channel -> whether it is kept; FIXED always is."""
Widths = dict[str, list[int]]
"""Module -> its sizes, where they are not the architecture's: outputs, inputs and groups of a Conv2d, outputs and
inputs of a Linear, features of a BatchNorm."""


def channel_masks(channels: Channels, kept: Kept) -> dict[str, Tensor]:
    """Plain weight name -> bool [outputs, inputs of a group]: whether the channels at both ends are kept.

    Under these masks a removed channel is never read, so that nothing of it reaches the logits: neither its
    convolution nor what BatchNorm and activation make of zeros.
    """
    return {name: torch.from_numpy(_mask(layer, kept)) for name, layer in channels.layers.items()}


def reading_masks(channels: Channels, kept: Kept) -> dict[str, Tensor]:
    """As `channel_masks`, for a network whose scores learn: the same logits, but removed channels are still computed.

    Only weights by which other channels read a removed one are masked. Were the weights that write it masked too, it
    would be zero, nothing would reach its scores, and it could never return.
    """
    return {name: torch.from_numpy(_read(layer, kept) | layer.inside) for name, layer in channels.layers.items()}


def _mask(layer: LayerChannels, kept: Kept) -> Kept:
    return kept[layer.outputs][:, None] & _read(layer, kept)


def _read(layer: LayerChannels, kept: Kept) -> Kept:
    """[outputs, inputs of a group]: whether the input's channel is kept."""
    inputs = kept[layer.inputs].reshape(layer.conv_groups, -1)
    return inputs.repeat(len(layer.outputs) // layer.conv_groups, axis=0)


@torch.no_grad()
def read_channels(network: nn.Module, channels: Channels) -> Kept:
    """The channels that some layer reads with a weight other than zero; the others do not reach the logits."""
    kept = np.zeros(channels.count + 1, np.bool_)
    kept[FIXED] = True
    for name, layer in channels.layers.items():
        weight = backbone_of(network).get_parameter(name)
        nonzero = (weight.flatten(2) if weight.dim() > 2 else weight[:, :, None]).ne(0).any(2).cpu().numpy()
        by_group = nonzero.reshape(layer.conv_groups, -1, nonzero.shape[1]).any(1)
        np.logical_or.at(kept, layer.inputs, by_group.reshape(-1))
    return kept


@torch.no_grad()
def remove_channels(network: Network, channels: Channels, kept: Kept) -> tuple[Network, Widths]:
    """A copy without the channels that are not kept, and the sizes of its layers; `network` is left alone.

    Its logits in eval mode are those of `network` under `channel_masks`, to rounding. Errors: ValueError naming the
    group of which no channel would be left.
    """
    _check_every_group_keeps_one(channels, kept)
    state, widths = network.backbone.state_dict(), Widths()
    for name, layer in channels.layers.items():
        module = name.removesuffix(".weight") if "." in name else ""
        weight, outputs = state[name], kept[layer.outputs]
        inputs = kept[layer.inputs].reshape(layer.conv_groups, -1)
        conv_groups = int(inputs.any(1).sum()) if layer.whole_groups else layer.conv_groups
        columns = inputs[inputs.any(1).argmax()]  # equal in all groups that are left
        state[name] = weight[_index(outputs)][:, _index(columns)]
        sizes = [int(outputs.sum()), int(columns.sum()) * conv_groups]
        if sizes != [len(layer.outputs), len(layer.inputs)]:
            widths[module] = [*sizes, conv_groups] if weight.dim() == 4 else sizes
        if (bias := f"{module}.bias" if module else "bias") in state:
            state[bias] = state[bias][_index(outputs)]
    for module, ids in channels.norms.items():
        if (features := int(kept[ids].sum())) != len(ids):
            widths[module] = [features]
            for part in ("weight", "bias", "running_mean", "running_var"):
                state[f"{module}.{part}"] = state[f"{module}.{part}"][_index(kept[ids])]
    smaller = copy.deepcopy(network)
    set_widths(smaller.backbone, widths)
    smaller.backbone.load_state_dict(state)
    return smaller, widths


def _index(kept: Kept) -> Tensor:
    return torch.from_numpy(np.flatnonzero(kept))


def _check_every_group_keeps_one(channels: Channels, kept: Kept) -> None:
    left = np.bincount(channels.groups[kept], minlength=len(channels.group_names))
    if len(empty := np.flatnonzero(left[1:] == 0)):
        raise ValueError(f"{channels.group_names[empty[0] + 1]}: no channel would be left; at least one must be")


@torch.no_grad()
def set_widths(backbone: nn.Module, widths: Mapping[str, list[int]]) -> None:
    """Give layers their sizes after removal; their tensors are to be loaded.

    Errors: ValueError for sizes that the layer cannot have; AttributeError for a module that is not there.
    """
    for name, sizes in widths.items():
        module = backbone.get_submodule(name)
        largest = _sizes(module)
        if not sizes or len(sizes) != len(largest) or not all(1 <= a <= b for a, b in zip(sizes, largest, strict=True)):
            raise ValueError(f"{name} has sizes {largest} before channels are removed, and cannot have {sizes}")
        shape = tuple(sizes)
        if isinstance(module, nn.Conv2d):
            module.out_channels, module.in_channels, module.groups = sizes
            shape = (sizes[0], sizes[1] // sizes[2], *module.kernel_size)
        elif isinstance(module, nn.Linear):
            module.out_features, module.in_features = sizes
        elif isinstance(module, _BatchNorm):
            (module.num_features,) = sizes
        for part, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if tensor.dim():  # not BatchNorm's count of batches
                resized = tensor.new_empty(shape if part == "weight" else sizes[:1])
                setattr(module, part, nn.Parameter(resized) if isinstance(tensor, nn.Parameter) else resized)


def _sizes(module: nn.Module) -> list[int]:
    if isinstance(module, nn.Conv2d):
        return [module.out_channels, module.in_channels, module.groups]
    if isinstance(module, nn.Linear):
        return [module.out_features, module.in_features]
    if isinstance(module, _BatchNorm):
        return [module.num_features]
    return []
