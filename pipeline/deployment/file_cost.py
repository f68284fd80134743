"""What an image costs, read from a file's own graph: ONNX files and torch.export programs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import torch

from pipeline.models.cost import Cost

QUANTISED = ("QuantizeLinear", "DequantizeLinear")


def onnx_cost(model: onnx.ModelProto, path: Path) -> Cost:
    """Of a model's convolutions and linear layers whose weights are constants, in float32 or int8.

    Errors: ValueError naming `path` for shapes that depend on more than the number of images.
    """
    return Cost.of_layers(_onnx_layers(model, path))


def _onnx_layers(model: onnx.ModelProto, path: Path) -> Iterator[tuple[int, int, int]]:
    graph = onnx.shape_inference.infer_shapes(model).graph
    shapes = {value.name: value.type.tensor_type.shape.dim for value in (*graph.value_info, *graph.output)}
    for node, tensor in onnx_weights(model):
        weight = onnx.numpy_helper.to_array(tensor)
        dims = list(shapes.get(node.output[0], ()))
        places = dims[2:] if node.op_type == "Conv" else dims[1:-1]
        if not dims or not all(dim.dim_value for dim in places):
            raise ValueError(
                f"{path}: the output size of {node.op_type} {node.name or node.output[0]} is not fixed, so its "
                "multiply-accumulates are unknown; give a file for images of one size"
            )
        yield weight.size, int(np.count_nonzero(weight)), math.prod(dim.dim_value for dim in places)


def onnx_weights(model: onnx.ModelProto) -> Iterator[tuple[onnx.NodeProto, onnx.TensorProto]]:
    """Convolutions and linear layers with their weights, in float32 or, before their scale, int8.

    A weight that two layers share comes twice; products of two activations have none.
    """
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    made_by = {name: node for node in model.graph.node for name in node.output}
    for node in model.graph.node:
        if node.op_type not in ("Conv", "Gemm", "MatMul"):
            continue
        source = made_by.get(node.input[1])
        name = source.input[0] if source is not None and source.op_type in QUANTISED else node.input[1]
        if name in constants:
            yield node, constants[name]


def program_cost(program: torch.export.ExportedProgram) -> Cost:
    """Of a program's convolutions and linear layers."""
    return Cost.of_layers(_program_layers(program))


def _program_layers(program: torch.export.ExportedProgram) -> Iterator[tuple[int, int, int]]:
    parameters = program.graph_signature.inputs_to_parameters
    aten = torch.ops.aten
    for node in program.graph.nodes:
        packet = getattr(node.target, "overloadpacket", None)
        if packet not in (aten.conv2d, aten.convolution, aten.linear):
            continue
        name = parameters.get(getattr(node.args[1], "name", ""))
        if name is None:
            continue
        weight, shape = program.state_dict[name], node.meta["val"].shape
        places = shape[1:-1] if packet is aten.linear else shape[2:]
        yield weight.numel(), int(weight.count_nonzero()), math.prod(map(int, places))
