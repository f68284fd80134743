"""An ONNX file as a torch module, through which gradients of its answers are taken.

Rounding has no gradient, so QuantizeLinear has a straight-through one: 1 where a value is inside the range, 0 where the
range cuts it off (which is how the file's ReLUs are expressed). Everything else is computed in float32 from the file's
own scales, zero points and weights.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.deployment.onnx_file import INPUT, OUTPUT

Attributes = dict[str, Any]
INTEGERS = {np.dtype(np.uint8), np.dtype(np.int8), np.dtype(np.int32)}


class CannotTwin(ValueError):
    """The file has an operation that the twin does not compute; the message names it."""


class Twin(nn.Module):
    """Maps images [n, 3, height, width] float32 in [0, 1] to the logits [n, num_classes] of an ONNX file.

    Errors: CannotTwin naming an operation that it does not have; OSError and onnx's errors for what is no ONNX file.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        graph = onnx.load(path).graph
        constants = {tensor.name: _tensor(numpy_helper.to_array(tensor)) for tensor in graph.initializer}
        self._nodes: list[tuple[str, Attributes, list[str], str]] = []
        for node in graph.node:
            attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
            if node.op_type not in OPERATIONS or node.domain or len(node.output) != 1:
                raise CannotTwin(f"{path} has a node {node.op_type} ({node.name}), whose gradient is not known here")
            inputs = list(node.input)
            if all(name in constants or not name for name in inputs):  # weights, whose int8 is turned into float once
                values = [constants[name] if name else None for name in inputs]
                constants[node.output[0]] = OPERATIONS[node.op_type](attributes, *values)
            else:
                self._nodes.append((node.op_type, attributes, inputs, node.output[0]))
        used = {name for _, _, inputs, _ in self._nodes for name in inputs}
        self._names = {name: f"constant_{index}" for index, name in enumerate(constants) if name in used}
        for name, attribute in self._names.items():
            self.register_buffer(attribute, constants[name])

    def forward(self, images: Tensor) -> Tensor:
        values: dict[str, Tensor | None] = {name: getattr(self, key) for name, key in self._names.items()}
        values |= {"": None, INPUT: images}
        for operation, attributes, inputs, output in self._nodes:
            values[output] = OPERATIONS[operation](attributes, *(values[name] for name in inputs))
        logits = values[OUTPUT]
        assert logits is not None
        return logits


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array.astype(np.float32) if array.dtype in INTEGERS else array.copy())


class _RoundThrough(torch.autograd.Function):
    """Rounds half to even, as ONNX does; the gradient passes."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return values.round()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


def _per_axis(attributes: Attributes, like: Tensor, constant: Tensor) -> Tensor:
    """A scale or zero point, one number or one per index of an axis, so that it broadcasts to `like`."""
    if constant.dim() == 0 or constant.numel() == 1:
        return constant.reshape(())
    axis = attributes.get("axis", 1) % like.dim()
    return constant.view([-1 if dimension == axis else 1 for dimension in range(like.dim())])


def _quantize(attributes: Attributes, x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """To uint8: activations are the only values that an exported file rounds as it runs."""
    levels = _RoundThrough.apply(x / _per_axis(attributes, x, scale))
    return (levels + _per_axis(attributes, x, zero_point)).clamp(0.0, 255.0)


def _dequantize(attributes: Attributes, q: Tensor, scale: Tensor, zero_point: Tensor | None = None) -> Tensor:
    shift = 0.0 if zero_point is None else _per_axis(attributes, q, zero_point)
    return (q - shift) * _per_axis(attributes, q, scale)


def _padded(attributes: Attributes, x: Tensor, fill: float) -> Tensor:
    """ONNX's pads are the beginnings, then the ends, and may differ."""
    if attributes.get("auto_pad", b"NOTSET") not in (b"NOTSET", b"VALID"):
        raise CannotTwin(f"auto_pad {attributes['auto_pad'].decode()} is not known here")
    pads = attributes.get("pads", [0, 0, 0, 0])
    half = len(pads) // 2
    around = [pad for axis in reversed(range(half)) for pad in (pads[axis], pads[half + axis])]
    return F.pad(x, around, value=fill) if any(around) else x


def _conv(attributes: Attributes, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.conv2d(
        _padded(attributes, x, 0.0),
        weight,
        bias,
        attributes.get("strides", 1),
        0,
        attributes.get("dilations", 1),
        attributes.get("group", 1),
    )


def _gemm(attributes: Attributes, a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
    a, b = (a.T if attributes.get("transA") else a), (b.T if attributes.get("transB") else b)
    product = attributes.get("alpha", 1.0) * (a @ b)
    return product if c is None else product + attributes.get("beta", 1.0) * c


def _batch_norm(
    attributes: Attributes, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, variance: Tensor
) -> Tensor:
    return F.batch_norm(x, mean, variance, weight, bias, False, 0.0, attributes.get("epsilon", 1e-5))


def _reduce_mean(attributes: Attributes, x: Tensor, axes: Tensor) -> Tensor:
    return x.mean(axes.tolist(), keepdim=bool(attributes.get("keepdims", 1)))


def _reshape(attributes: Attributes, x: Tensor, shape: Tensor) -> Tensor:
    sizes = shape.tolist()
    return x.reshape(
        [x.shape[i] if size == 0 and not attributes.get("allowzero") else size for i, size in enumerate(sizes)]
    )


def _max_pool(attributes: Attributes, x: Tensor) -> Tensor:
    x, ceil = _padded(attributes, x, float("-inf")), bool(attributes.get("ceil_mode", 0))
    dilations = attributes.get("dilations", 1)
    return F.max_pool2d(x, attributes["kernel_shape"], attributes.get("strides", 1), 0, dilations, ceil)


def _average_pool(attributes: Attributes, x: Tensor) -> Tensor:
    pads = attributes.get("pads", [0, 0, 0, 0])
    if attributes.get("ceil_mode") or (any(pads) and not attributes.get("count_include_pad")):
        raise CannotTwin("an AveragePool that leaves out its padding is not known here")
    return F.avg_pool2d(_padded(attributes, x, 0.0), attributes["kernel_shape"], attributes.get("strides", 1))


def _clip(attributes: Attributes, x: Tensor, low: Tensor | None = None, high: Tensor | None = None) -> Tensor:
    return x.clamp(low, high)


OPERATIONS: dict[str, Callable[..., Tensor]] = {
    "Add": lambda _, a, b: a + b,
    "AveragePool": _average_pool,
    "BatchNormalization": _batch_norm,
    "Clip": _clip,
    "Concat": lambda attributes, *parts: torch.cat(parts, attributes["axis"]),
    "Conv": _conv,
    "DequantizeLinear": _dequantize,
    "Div": lambda _, a, b: a / b,
    "Flatten": lambda attributes, x: x.flatten(attributes.get("axis", 1)),
    "Gemm": _gemm,
    "GlobalAveragePool": lambda _, x: x.mean([2, 3], keepdim=True),
    "HardSigmoid": lambda attributes, x: (attributes.get("alpha", 0.2) * x + attributes.get("beta", 0.5)).clamp(
        0.0, 1.0
    ),
    "HardSwish": lambda _, x: F.hardswish(x),
    "Identity": lambda _, x: x,
    "MatMul": lambda _, a, b: a @ b,
    "MaxPool": _max_pool,
    "Mul": lambda _, a, b: a * b,
    "QuantizeLinear": _quantize,
    "ReduceMean": _reduce_mean,
    "Relu": lambda _, x: x.relu(),
    "Reshape": _reshape,
    "Sigmoid": lambda _, x: x.sigmoid(),
    "Sub": lambda _, a, b: a - b,
    "Transpose": lambda attributes, x: x.permute(attributes["perm"]),
}
"""ONNX operation -> its value from (attributes, *inputs); an input that is left out is None."""
