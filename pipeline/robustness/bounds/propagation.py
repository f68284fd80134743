"""Sound bounds of a network over boxes: intervals, a linear backward pass over them, and symbolic intervals.

Margins are lower bounds of logit_y - logit_j for every class j; an image is proved robust if all of them are positive,
except that of y itself, which is 0. Everything is computed in the weights' dtype, float32 in practice, with autocast
off: bfloat16 has 8 significant bits, and rounding errors of that size make a bound unsound. float32 rounds to nearest
as well, so a bound has the same error as the network's own forward, about 1e-6 of the largest activation.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.robustness.bounds.graph import Graph, Layer
from pipeline.robustness.bounds.layers import Statistics
from pipeline.robustness.bounds.operations import Box, Dense, MaxPool, Operation, Relu, highest, lowest

RUNNING: Statistics = MappingProxyType({})
"""No batch statistics: every BatchNorm is in eval mode."""


def linf_box(x: Tensor, eps: float) -> Box:
    """All images within eps of x in every pixel, clipped to the valid range [0, 1]."""
    return Box((x - eps).clamp(0.0, 1.0), (x + eps).clamp(0.0, 1.0))


@dataclass(frozen=True)
class Bounds:
    """Boxes of all values of a network, and the margins derived from them."""

    graph: Graph
    operations: tuple[Operation, ...]
    boxes: tuple[Box, ...]
    """One per value: the image's, then each layer's."""

    @property
    def logits(self) -> Box:
        """Bounds of every logit on its own, [n, classes]."""
        return self.boxes[self.graph.output]

    def interval_margins(self, y: Tensor) -> Tensor:
        """Margins [n, classes] from the boxes, with the last linear layer merged into the difference of logits.

        (Gowal et al. 2018, section 3, "elision of the last layer".)
        """
        with torch.autocast(y.device.type, enabled=False):
            a, value, constant = _differences(y, self.logits.lower), self.graph.output, 0.0
            while value and isinstance(operation := self.operations[value - 1], Dense):
                (value,) = self.graph.layers[value - 1].inputs
                (a,), low, _ = operation.bound_backward(a, (self.boxes[value],), parallel=False)
                constant = constant + low
            return lowest(a, self.boxes[value]) + constant

    def linear_margins(self, y: Tensor, parallel: bool = False) -> Tensor:
        """Margins [n, classes] as linear functions of the image, propagated backward through all layers.

        With interval boxes this is CROWN-IBP (Zhang et al., ICLR 2020, section 3.2); with `parallel` lines and symbolic
        boxes, the symbolic intervals of MixTrain.
        """
        with torch.autocast(y.device.type, enabled=False):
            a = _differences(y, self.logits.lower)
            low, _ = _bound_backward(self.graph.layers, self.operations, self.boxes, self.graph.output, a, parallel)
        return low


def proved(margins: Tensor, y: Tensor) -> Tensor:
    """Whether margins [n, classes] rule out every class but y [n]: bool [n]."""
    return (margins > 0).scatter(1, y.unsqueeze(1), True).all(dim=1)


def interval_bounds(graph: Graph, box: Box, statistics: Statistics = RUNNING) -> Bounds:
    """Interval bound propagation (Gowal et al. 2018, section 3): center and radius through every layer.

    `box` holds images [n, channels, h, w]; BatchNorm in training mode needs `batch_statistics_of` the clean forward.
    Errors: ValueError if statistics are missing.
    """
    with torch.autocast(box.lower.device.type, enabled=False):
        operations = _bind(graph, statistics)
        boxes = [box]
        for layer, operation in zip(graph.layers, operations, strict=True):
            boxes.append(operation.interval(*(boxes[i] for i in layer.inputs)))
        return Bounds(graph, operations, tuple(boxes))


def symbolic_bounds(graph: Graph, box: Box, statistics: Statistics = RUNNING) -> Bounds:
    """Symbolic intervals (Wang et al., MixTrain, 2018): a ReLU's input is bounded by linear functions of the image.

    An undecided ReLU lies between two parallel lines. The published code propagates the linear functions forward, with
    one symbol per pixel and per undecided ReLU; propagating backward from each layer gives the same numbers in less
    memory, and each box is intersected with the interval box, which is tighter. Only undecided ReLUs are refined;
    counting them costs one GPU synchronisation per layer. Time and memory are proportional to n times their number.
    """
    with torch.autocast(box.lower.device.type, enabled=False):
        operations = _bind(graph, statistics)
        readers: dict[int, list[Operation]] = {}
        for layer, operation in zip(graph.layers, operations, strict=True):
            if isinstance(operation, Relu | MaxPool):
                readers.setdefault(layer.inputs[0], []).append(operation)
        boxes, depths = [box], [0]
        for value, (layer, operation) in enumerate(zip(graph.layers, operations, strict=True), start=1):
            boxes.append(operation.interval(*(boxes[i] for i in layer.inputs)))
            depths.append(max(depths[i] for i in layer.inputs) + operation.mixes)
            if value in readers and depths[value] > 1:  # boxes are exact up to the first layer that mixes
                boxes[value] = _refine(graph.layers, operations, boxes, value, readers[value])
        return Bounds(graph, operations, tuple(boxes))


def _refine(
    layers: tuple[Layer, ...],
    operations: tuple[Operation, ...],
    boxes: list[Box],
    value: int,
    readers: list[Operation],
) -> Box:
    """The box of `value`, intersected with its symbolic bounds where its readers can use them."""
    lower, upper = (bound.flatten(1) for bound in boxes[value])
    to_refine = torch.ones_like(lower[0], dtype=torch.bool)
    if all(isinstance(reader, Relu) for reader in readers):
        to_refine = ((lower < 0) & (upper > 0)).any(dim=0)
    index = to_refine.nonzero().squeeze(1)
    if len(index) == 0:
        return boxes[value]
    shape = boxes[value].lower.shape
    a = F.one_hot(index, lower.shape[1]).to(lower.dtype).expand(len(lower), -1, -1).reshape(len(lower), -1, *shape[1:])
    low, high = _bound_backward(layers, operations, boxes, value, a, parallel=True)
    # Rounding could make the two cross, and interval propagation would amplify the negative width.
    low = torch.minimum(torch.maximum(lower[:, index], low), upper[:, index])
    high = torch.maximum(torch.minimum(upper[:, index], high), low)
    return Box(lower.index_copy(1, index, low).view(shape), upper.index_copy(1, index, high).view(shape))


def _bind(graph: Graph, statistics: Statistics) -> tuple[Operation, ...]:
    operations: list[Operation] = []
    for layer in graph.layers:
        try:
            operations.append(layer.bind(statistics))
        except ValueError as error:
            raise ValueError(f"{layer.name} cannot be bounded: {error}") from None
    return tuple(operations)


def _differences(y: Tensor, like: Tensor) -> Tensor:
    """The linear functions logit_y - logit_j: y [n] -> [n, classes, classes]."""
    eye = torch.eye(like.shape[1], dtype=like.dtype, device=like.device)
    return eye[y].unsqueeze(1) - eye


def _bound_backward(
    layers: tuple[Layer, ...],
    operations: tuple[Operation, ...],
    boxes: tuple[Box, ...] | list[Box],
    value: int,
    a: Tensor,
    parallel: bool,
) -> tuple[Tensor, Tensor]:
    """Bounds [n, specs] of linear functions a [n, specs, ...] of `value`; the upper ones only if `parallel`."""
    low, high = torch.zeros(2, *a.shape[:2], dtype=a.dtype, device=a.device)
    pending = {value: a}
    for index in range(value, 0, -1):
        if (coefficients := pending.pop(index, None)) is None:
            continue
        inputs = layers[index - 1].inputs
        input_coefficients, below, above = operations[index - 1].bound_backward(
            coefficients, tuple(boxes[i] for i in inputs), parallel
        )
        low, high = low + below, high + above
        for i, part in zip(inputs, input_coefficients, strict=True):
            pending[i] = pending[i] + part if i in pending else part
    return lowest(pending[0], boxes[0]) + low, highest(pending[0], boxes[0]) + high
