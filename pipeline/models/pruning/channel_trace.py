"""Follows the channels of a network through one forward pass, operation by operation.

A sum ties the channels of its terms (residual streams), a depthwise convolution its inputs to its outputs, and
flattening repeats a channel for every position. Where an operation mixes channels otherwise (normalisation over
channels, attention, channel shuffles, anything unknown), they stay: only what is known to leave the logits as they are
is ever removed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

Ids = NDArray[np.int64]
FIXED = 0
"""Id of all channels that stay: image channels, classes, and those that an operation mixes."""


@dataclass(frozen=True)
class LayerChannels:
    """The coupled channels of one Conv2d or Linear."""

    outputs: Ids
    """[outputs]: the id of each output's coupled channel."""
    inputs: Ids
    """[inputs]: likewise, over all groups of the convolution."""
    conv_groups: int
    """1 for a Linear."""
    whole_groups: bool
    """Channels are tied so that whole groups of the convolution go (depthwise ones, above all); otherwise equal
    positions in all of its groups go together."""
    area: int
    """Of the kernel; 1 for a Linear."""
    positions: int
    """Dot products per image and output: the output's height times width; 0 for a layer that is never used."""

    @cached_property
    def inside(self) -> NDArray[np.bool_]:
        """[outputs, inputs of a group]: where one channel is at both ends of a weight."""
        inputs = self.inputs.reshape(self.conv_groups, -1).repeat(len(self.outputs) // self.conv_groups, axis=0)
        return (self.outputs[:, None] == inputs) & (inputs != FIXED)


class Union:
    """Disjoint sets of ids; FIXED is the root of its set."""

    def __init__(self) -> None:
        self._parent = [FIXED]

    def fresh(self, count: int) -> Ids:
        start = len(self._parent)
        self._parent.extend(range(start, start + count))
        return np.arange(start, start + count)

    def root(self, member: int) -> int:
        while (parent := self._parent[member]) != member:
            self._parent[member] = self._parent[parent]
            member = parent
        return member

    def tie(self, first: Ids, second: Ids) -> None:
        """Element by element, broadcast."""
        for a, b in np.broadcast(first, second):
            low, high = sorted((self.root(int(a)), self.root(int(b))))
            self._parent[high] = low

    def roots(self, ids: Ids) -> Ids:
        return np.array([self.root(int(i)) for i in ids], np.int64)


@dataclass(frozen=True)
class _Axis:
    """Along dimension `dim` of a tensor, index i is channel ids[i]; along the others, channels do not change."""

    dim: int
    ids: Ids


class Trace(TorchDispatchMode):
    """Gives every activation of a forward pass its channels; a tensor that has none is constant, or stays."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self._names = {id(parameter): name for name, parameter in backbone.named_parameters()}
        self._transposed: dict[int, str] = {}
        self._axes: dict[int, tuple[Tensor, _Axis | None]] = {}
        """By the tensor's id; the tensor is kept, so that the id is not reused."""
        self.union = Union()
        self.layers: dict[str, LayerChannels] = {}
        self.norms: dict[str, Ids] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        output = result[0] if isinstance(result, (tuple, list)) else result
        name = func.overloadpacket.__name__.removesuffix("_")  # in place or not
        if name in RULES:
            axis = RULES[name](self, args, output)
        elif torch.Tag.pointwise in func.tags:
            axis = self._pointwise(args, output)
        else:
            axis = self._mixed(args)
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            self._axes[id(tensor)] = (tensor, axis if tensor is output else None)
        return result

    def fix(self, tensor: Any) -> None:
        if (axis := self._axis(tensor)) is not None:
            self.union.tie(axis.ids, np.zeros(1, np.int64))

    def _axis(self, tensor: Any) -> _Axis | None:
        return self._axes.get(id(tensor), (None, None))[1]

    def _mixed(self, args: Any) -> None:
        """Every channel among the arguments stays."""
        for argument in args:
            for tensor in argument if isinstance(argument, (tuple, list)) else [argument]:
                self.fix(tensor)

    def _unchanged(self, args: Any, output: Tensor) -> _Axis | None:
        """Operations on each channel alone that keep the number of dimensions."""
        return self._axis(args[0])

    def _pointwise(self, args: Any, output: Tensor) -> _Axis | None:
        tensors = [argument for argument in args if isinstance(argument, Tensor)]
        axes = [axis for tensor in tensors if (axis := self._axis(tensor)) is not None]
        if not axes:
            return None
        ids = max((axis.ids for axis in axes), key=len)
        dim = next(axis.dim - tensor.ndim for tensor in tensors if (axis := self._axis(tensor)) is not None)
        for tensor in tensors:
            axis = self._axis(tensor)
            if axis is not None and (axis.dim - tensor.ndim, len(axis.ids)) == (dim, len(ids)):
                self.union.tie(ids, axis.ids)
            elif axis is not None or (tensor.ndim >= -dim and tensor.shape[dim] != 1):
                return self._mixed(args)
        return _Axis(output.ndim + dim, ids)

    def _convolution(self, args: Any, output: Tensor) -> _Axis | None:
        x, weight, groups = args[0], args[1], args[8]
        name = self._names.get(id(weight))
        axis = self._axis(x)
        if name is None or args[6] or (axis is not None and axis.dim != 1):
            return self._mixed(args)
        positions = output.shape[2:].numel()
        return _Axis(1, self._layer(name, weight, axis, groups, positions, weight.shape[2:].numel()))

    def _layer(self, name: str, weight: Tensor, axis: _Axis | None, groups: int, positions: int, area: int = 1) -> Ids:
        """The channels of the outputs of a layer."""
        width = weight.shape[1]
        inputs = axis.ids if axis is not None else np.zeros(width * groups, np.int64)
        whole = groups > 1 and groups >= width
        if (before := self.layers.get(name)) is not None:  # used a second time
            self.union.tie(inputs, before.inputs)
            outputs, positions = before.outputs, positions + before.positions
        else:
            outputs = self.union.fresh(weight.shape[0])
            by_group = [ids.reshape(groups, -1) for ids in (inputs, outputs)]
            for ids in by_group if groups > 1 else []:
                self.union.tie(ids, ids[:, :1] if whole else ids[:1])
            if whole:
                self.union.tie(by_group[0][:, 0], by_group[1][:, 0])
        self.layers[name] = LayerChannels(outputs, inputs, groups, whole, area, positions)
        return outputs

    def _linear(self, args: Any, output: Tensor) -> _Axis | None:
        x, transposed = args[-2], args[-1]
        name, axis = self._transposed.get(id(transposed)), self._axis(x)
        if name is None and len(args) == 2:
            return self._products(args, output)
        if name is None or (axis is not None and axis.dim != 1):
            return self._mixed(args)
        return _Axis(1, self._layer(name, transposed.T, axis, 1, x.shape[0]))

    def _transpose(self, args: Any, output: Tensor) -> _Axis | None:
        """Of a matrix, `t`, or of two dimensions."""
        tensor, dims = args[0], [dim % args[0].ndim for dim in args[1:]] or [0, 1]
        if (name := self._names.get(id(tensor))) is not None:
            self._transposed[id(output)] = name
        axis = self._axis(tensor)
        swapped = {dims[0]: dims[1], dims[1]: dims[0]}
        return axis and _Axis(swapped.get(axis.dim, axis.dim), axis.ids)

    def _permute(self, args: Any, output: Tensor) -> _Axis | None:
        axis = self._axis(args[0])
        return axis and _Axis([dim % output.ndim for dim in args[1]].index(axis.dim), axis.ids)

    def _view(self, args: Any, output: Tensor) -> _Axis | None:
        """Folds a channel and its positions into one dimension, or unfolds them; or leaves channels alone."""
        tensor, axis = args[0], self._axis(args[0])
        if axis is None:
            return None
        before = tensor.shape[: axis.dim].numel()
        for dim, size in enumerate(output.shape):
            if output.shape[:dim].numel() != before or size == 1:
                continue
            if size % len(axis.ids) == 0:
                return _Axis(dim, axis.ids.repeat(size // len(axis.ids)))
            if len(axis.ids) % size == 0:
                blocks = axis.ids.reshape(size, -1)
                if (blocks == blocks[:, :1]).all():
                    return _Axis(dim, blocks[:, 0])
        return self._mixed(args)

    def _cat(self, args: Any, output: Tensor) -> _Axis | None:
        tensors, dim = args[0], (args[1] if len(args) > 1 else 0) % output.ndim
        axes = [self._axis(tensor) for tensor in tensors]
        if not any(axes):
            return None
        if any(axis is not None and axis.dim != dim for axis in axes):
            return self._mixed(args)
        parts = [axis.ids if axis else np.zeros(t.shape[dim], np.int64) for axis, t in zip(axes, tensors, strict=True)]
        return _Axis(dim, np.concatenate(parts))

    def _mean(self, args: Any, output: Tensor) -> _Axis | None:
        tensor, axis = args[0], self._axis(args[0])
        dims = [dim % tensor.ndim for dim in (args[1] or range(tensor.ndim))] if len(args) > 1 else range(tensor.ndim)
        if axis is None or axis.dim in dims:
            return self._mixed(args)
        gone = 0 if output.ndim == tensor.ndim else sum(dim < axis.dim for dim in dims)
        return _Axis(axis.dim - gone, axis.ids)

    def _batch_norm(self, args: Any, output: Tensor) -> _Axis | None:
        axis = self._axis(args[0])
        if (name := self._names.get(id(args[1]))) is not None:
            ids = axis.ids if axis is not None else np.zeros(output.shape[1], np.int64)
            if (before := self.norms.get(name.removesuffix(".weight"))) is not None:
                self.union.tie(ids, before)
            self.norms[name.removesuffix(".weight")] = ids
        return axis

    def _layer_norm(self, args: Any, output: Tensor) -> _Axis | None:
        axis = self._axis(args[0])
        return self._mixed(args) if axis and axis.dim >= output.ndim - len(args[1]) else axis

    def _products(self, args: Any, output: Tensor) -> _Axis | None:
        """Matrix products, of each channel alone: the same linear map of its positions, as in pooling to a grid."""
        first, second = map(self._axis, args)
        if (first is None) == (second is None):
            return self._mixed(args)
        summed = output.ndim - (1 if second is None else 2)
        axis = first or second
        return axis if axis and axis.dim != summed else self._mixed(args)


RULES: dict[str, Callable[[Trace, Any, Tensor], _Axis | None]] = {
    "convolution": Trace._convolution,
    "addmm": Trace._linear,
    "mm": Trace._linear,
    "t": Trace._transpose,
    "transpose": Trace._transpose,
    "permute": Trace._permute,
    "view": Trace._view,
    "_unsafe_view": Trace._view,
    "cat": Trace._cat,
    "mean": Trace._mean,
    "native_batch_norm": Trace._batch_norm,
    "native_layer_norm": Trace._layer_norm,
    "bmm": Trace._products,
    **dict.fromkeys(("max_pool2d_with_indices", "avg_pool2d", "_adaptive_avg_pool2d"), Trace._unchanged),
    **dict.fromkeys(("clone", "detach", "alias", "_to_copy", "expand"), Trace._unchanged),
    **dict.fromkeys(("hardtanh", "hardswish"), Trace._unchanged),  # not marked as pointwise
}
"""Operation of torch -> its rule; pointwise operations have one together, all others mix."""
