"""A network as a list of operations, traced once by torch.fx.

Every `bind` reads the weights through the modules again, so that masks apply and gradients reach weights and scores.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.proxy import TraceError
from torch.nn.utils.parametrize import type_before_parametrizations

from pipeline.robustness.bounds.layers import FUNCTIONS, MODULES, Bind, Statistics, Unsupported, fixed_operation
from pipeline.robustness.bounds.operations import Operation, Scale, Sum


@dataclass(frozen=True)
class Layer:
    """Computes one value of a network from earlier ones; value 0 is the image, and layer i computes value i + 1."""

    name: str
    inputs: tuple[int, ...]
    bind: Bind
    """Reads the current weights and returns the operation."""


@dataclass(frozen=True)
class Graph:
    """A network's layers in topological order; `output` is the index of the logits' value."""

    layers: tuple[Layer, ...]
    output: int


ADDITIONS = (operator.add, operator.iadd, torch.add, "add", "add_")
SUBTRACTIONS = (operator.sub, operator.isub, torch.sub, "sub", "sub_")
MULTIPLICATIONS = (operator.mul, operator.imul, torch.mul, "mul", "mul_")
DIVISIONS = (operator.truediv, operator.itruediv, torch.div, "div", "div_")
IN_PLACE = (operator.iadd, operator.isub, operator.imul, operator.itruediv)
SUPPORTED = ", ".join(
    [layer.__name__ for layer in MODULES]
    + ["relu, flatten, pooling as functions", "sums of two branches", "arithmetic with constants per channel"]
)


class _Tracer(fx.Tracer):
    """Treats layers that have bounds as leaves, with or without scores."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, tuple(MODULES)) or super().is_leaf_module(m, module_qualified_name)


def trace(network: nn.Module) -> Graph:
    """The layers of a network that maps images [n, channels, h, w] to logits [n, classes].

    Weights, mode and device may change afterwards; the layers may not.
    Errors: ValueError naming a layer without bounds and listing the supported ones, or for a forward that cannot be
    traced.
    """
    try:
        fx_graph = _Tracer().trace(network)
    except (TraceError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{type(network).__name__} cannot be bounded: its forward cannot be traced ({error}); "
            "write it without branches on its input"
        ) from error
    values: dict[fx.Node, int] = {}
    layers: list[Layer] = []
    for node in fx_graph.nodes:
        if node.op == "placeholder":
            if values:
                raise ValueError(f"{type(network).__name__} cannot be bounded: its forward takes more than the images")
            values[node] = 0
        elif node.op == "output":
            (logits,) = node.args
            if not isinstance(logits, fx.Node):
                raise ValueError(f"{type(network).__name__} cannot be bounded: it returns more than logits")
            return Graph(tuple(layers), values[logits])
        elif node.op != "get_attr":  # constants are read by the operations that use them
            layers.append(_layer(network, node, values))
            values[node] = len(layers)
    raise AssertionError("a traced graph ends with its output")


def _layer(network: nn.Module, node: fx.Node, values: dict[fx.Node, int]) -> Layer:
    module = network.get_submodule(str(node.target)) if node.op == "call_module" else None
    kind = getattr(node.target, "__name__", node.target) if module is None else type(module).__name__
    name = f"{node.name if module is None else node.target} ({kind})"
    inputs = tuple(values[a] for a in node.args if isinstance(a, fx.Node) and a in values)
    try:
        if _modifies_input(node, module) and len(node.all_input_nodes[0].users) > 1:
            raise Unsupported("it modifies in place a tensor that another layer reads; give it its own copy")
        if module is not None:
            build = MODULES.get(type_before_parametrizations(module))  # exact type: a subclass may override forward
            bind = None if build is None else build(module)
        elif node.target in FUNCTIONS and len(inputs) == 1:
            bind = FUNCTIONS[node.target](*node.args[1:], **node.kwargs)
        else:
            bind = _arithmetic(network, node, values)
        if bind is None:
            raise Unsupported("it has no bounds")
    except (Unsupported, TypeError) as error:
        raise ValueError(f"{name} cannot be bounded: {error}; supported are {SUPPORTED}") from None
    return Layer(name, inputs, bind)


def _modifies_input(node: fx.Node, module: nn.Module | None) -> bool:
    if module is not None:
        return bool(getattr(module, "inplace", False))
    return node.target in IN_PLACE or str(node.target).endswith("_") or bool(node.kwargs.get("inplace", False))


def _arithmetic(network: nn.Module, node: fx.Node, values: dict[fx.Node, int]) -> Bind | None:
    """The sum of two values, or + - * / of a value and a constant; None for other nodes."""
    kind = next((k for k in (ADDITIONS, SUBTRACTIONS, MULTIPLICATIONS, DIVISIONS) if node.target in k), None)
    if kind is None:
        return None
    if len(node.args) != 2 or node.kwargs:
        raise Unsupported(f"it has more than its two operands: {dict(node.kwargs)}")
    left, right = node.args
    if left in values and right in values:
        if kind is not ADDITIONS:
            raise Unsupported("only the sum of two branches has bounds")
        return fixed_operation(Sum())
    if left not in values:
        if kind not in (ADDITIONS, MULTIPLICATIONS):
            raise Unsupported("its first operand is a constant; write the constant second")
        right = left

    def bind(statistics: Statistics) -> Operation:
        constant = _constant(network, right)
        one, zero = torch.ones_like(constant), torch.zeros_like(constant)
        if kind is MULTIPLICATIONS:
            return Scale(constant, zero)
        if kind is DIVISIONS:
            return Scale(one / constant, zero)
        return Scale(one, constant if kind is ADDITIONS else -constant)

    return bind


def _constant(network: nn.Module, argument: Any) -> Tensor:
    """A number, or a buffer [channels, 1, 1] or [1, channels, 1, 1]."""
    if not isinstance(argument, fx.Node):
        return torch.tensor(float(argument))
    owner, _, name = str(argument.target).rpartition(".")
    tensor = getattr(network.get_submodule(owner), name)
    if tensor.dim() == 4 and tensor.shape[0] == 1:
        return tensor[0]
    if tensor.dim() not in (0, 3):
        raise Unsupported(f"the constant {argument.target} has shape {tuple(tensor.shape)}")
    return tensor


@contextmanager
def batch_statistics_of(network: nn.Module) -> Iterator[dict[nn.Module, tuple[Tensor, Tensor]]]:
    """Captures the batch statistics of every BatchNorm in training mode during the one forward inside the context.

    They are the statistics of the clean images, with their autograd graph: bounds normalised by them are bounds of
    exactly the function that the clean forward computed, and no further forward updates the running statistics. (A box
    has no batch statistics of its own, because none of its points is a sample.)
    """
    statistics: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def capture(layer: nn.Module, inputs: Any, output: Any) -> None:
        if layer.training:
            values = inputs[0]
            values = values.to(torch.promote_types(values.dtype, torch.float32))
            variance, mean = torch.var_mean(values, [d for d in range(values.dim()) if d != 1], correction=0)
            statistics[layer] = (mean, variance)

    layers = [m for m in network.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]
    hooks = [layer.register_forward_hook(capture) for layer in layers]
    try:
        yield statistics
    finally:
        for hook in hooks:
            hook.remove()
