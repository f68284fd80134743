"""The layers that have bounds, and the operation that each stands for.

A builder checks a layer's settings once and rejects those without bounds. The `Bind` that it returns reads the weights
through the module at every call, so that masks apply and gradients reach weights and scores.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.models.architectures.pooling import GridAverage
from pipeline.robustness.bounds.operations import (
    Average,
    Convolution,
    Dense,
    Flatten,
    Identity,
    MaxPool,
    Operation,
    Pair,
    Relu,
    Scale,
)

Statistics = Mapping[nn.Module, tuple[Tensor, Tensor]]
"""BatchNorm layer in training mode -> (mean, biased variance) of the batch, each [channels]."""

Bind = Callable[[Statistics], Operation]
"""Reads the current weights."""


class Unsupported(ValueError):
    """Why a layer has no bounds; the caller adds the layer's name."""


def _pair(value: Any) -> Pair:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def fixed_operation(operation: Operation) -> Bind:
    return lambda statistics: operation


def _convolution(layer: nn.Conv2d) -> Bind:
    if layer.padding_mode != "zeros" or isinstance(layer.padding, str):
        raise Unsupported(f"padding {layer.padding!r} of mode {layer.padding_mode!r}; use numeric zero padding")
    stride, padding, dilation = _pair(layer.stride), _pair(layer.padding), _pair(layer.dilation)
    return lambda statistics: Convolution(layer.weight, layer.bias, stride, padding, dilation, layer.groups)


def _dense(layer: nn.Linear) -> Bind:
    return lambda statistics: Dense(layer.weight, layer.bias)


def _batch_norm(layer: nn.BatchNorm1d | nn.BatchNorm2d) -> Bind:
    shape = (-1, 1, 1) if isinstance(layer, nn.BatchNorm2d) else (-1,)

    def bind(statistics: Statistics) -> Operation:
        if layer in statistics:
            mean, variance = statistics[layer]
        elif layer.training or layer.running_mean is None or layer.running_var is None:
            raise Unsupported("it normalises by batch statistics, which are missing; see batch_statistics_of")
        else:
            mean, variance = layer.running_mean, layer.running_var
        factor = torch.rsqrt(variance + layer.eps)
        factor = factor if layer.weight is None else factor * layer.weight
        offset = -mean * factor if layer.bias is None else layer.bias - mean * factor
        return Scale(factor.view(shape), offset.view(shape))

    return bind


def _dropout(layer: nn.Dropout | nn.Dropout2d) -> Bind:
    def bind(statistics: Statistics) -> Operation:
        if layer.training and layer.p > 0:
            raise Unsupported(f"dropout with p {layer.p} in training mode; train with p 0")
        return Identity()

    return bind


def _average(
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Bind:
    if divisor_override is not None:
        raise Unsupported(f"divisor_override {divisor_override}; remove it")
    kernels, paddings = _pair(kernel_size), _pair(padding)
    strides = kernels if stride is None else _pair(stride)

    def matrix(axis: int) -> Callable[[int, Tensor], Tensor]:
        options = (kernels[axis], strides[axis], paddings[axis], ceil_mode, count_include_pad)
        return lambda size, like: F.avg_pool1d(torch.eye(size).to(like), *options)

    return fixed_operation(Average((matrix(0), matrix(1))))


def _adaptive_average(output_size: Any) -> Bind:
    sizes = _pair(output_size)

    def matrix(pooled: int | None) -> Callable[[int, Tensor], Tensor | None]:
        return lambda size, like: (
            None if pooled in (None, size) else F.adaptive_avg_pool1d(torch.eye(size).to(like), pooled)
        )

    return fixed_operation(Average((matrix(sizes[0]), matrix(sizes[1]))))


def _max_pool(
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Bind:
    if _pair(dilation) != (1, 1) or ceil_mode or return_indices:
        raise Unsupported("max pooling with dilation, ceil_mode or return_indices; remove them")
    kernel = _pair(kernel_size)
    return fixed_operation(MaxPool(kernel, kernel if stride is None else _pair(stride), _pair(padding)))


def _flatten(start_dim: int = 0, end_dim: int = -1) -> Bind:
    if (start_dim, end_dim) != (1, -1):
        raise Unsupported(f"flatten from {start_dim} to {end_dim}; flatten from 1 to -1")
    return fixed_operation(Flatten())


def _relu(inplace: bool = False) -> Bind:
    return fixed_operation(Relu())


MODULES: dict[type[nn.Module], Callable[[Any], Bind]] = {
    nn.Conv2d: _convolution,
    nn.Linear: _dense,
    nn.BatchNorm1d: _batch_norm,
    nn.BatchNorm2d: _batch_norm,
    nn.ReLU: lambda layer: _relu(),
    nn.AvgPool2d: lambda layer: _average(
        layer.kernel_size,
        layer.stride,
        layer.padding,
        layer.ceil_mode,
        layer.count_include_pad,
        layer.divisor_override,
    ),
    nn.AdaptiveAvgPool2d: lambda layer: _adaptive_average(layer.output_size),
    GridAverage: lambda layer: _adaptive_average((layer.rows, layer.columns)),
    nn.MaxPool2d: lambda layer: _max_pool(
        layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.ceil_mode, layer.return_indices
    ),
    nn.Flatten: lambda layer: _flatten(layer.start_dim, layer.end_dim),
    nn.Identity: lambda layer: fixed_operation(Identity()),
    nn.Dropout: _dropout,
    nn.Dropout2d: _dropout,
}
"""Layer type -> builder, from the layer."""

FUNCTIONS: dict[Any, Callable[..., Bind]] = {
    F.relu: _relu,
    torch.relu: _relu,
    torch.flatten: _flatten,
    F.avg_pool2d: _average,
    F.adaptive_avg_pool2d: _adaptive_average,
    F.max_pool2d: _max_pool,
    "relu": _relu,
    "relu_": _relu,
    "flatten": _flatten,
}
"""Function, or name of a tensor method -> builder, from the arguments after the tensor."""
