"""A network's operations, each with interval and linear bounds.

An operation maps boxes of its inputs to a box of its output (`interval`), and linear functions of its output to linear
functions of its inputs (`bound_backward`): for coefficients a [n, specs, ...output] it returns one coefficient tensor
[n, specs, ...input] per input and two constants [n, specs] such that, for all inputs in their boxes,

    sum(a * output) >= sum(coefficients * input) + low

and, if `parallel`, sum(a * output) <= sum(coefficients * input) + high with the same coefficients. For affine
operations both are equalities. Everything is differentiable with respect to weights and boxes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

NARROW = 1e-6
"""Narrower boxes are bounded by a line of slope 0 or 1: the gradient of the chord's slope would reach 1e6."""

Constant = Tensor | float
BackwardBound = tuple[tuple[Tensor, ...], Constant, Constant]
Pair = tuple[int, int]


class Box(NamedTuple):
    """lower <= value <= upper, elementwise; both [n, ...]."""

    lower: Tensor
    upper: Tensor

    @property
    def center(self) -> Tensor:
        return (self.lower + self.upper) / 2

    @property
    def radius(self) -> Tensor:
        return (self.upper - self.lower) / 2


class Operation(Protocol):
    """One operation of a network, with its current weights."""

    mixes: ClassVar[bool]
    """Whether an output depends on several inputs, so that intervals of two such operations in a row are not tight."""

    def interval(self, *boxes: Box) -> Box: ...

    def bound_backward(self, a: Tensor, boxes: tuple[Box, ...], parallel: bool) -> BackwardBound: ...


def _dot(a: Tensor, values: Tensor) -> Tensor:
    """[n, specs, ...] and [n, ...] -> [n, specs]: the inner product over the other dimensions."""
    return torch.bmm(a.flatten(2), values.flatten(1).unsqueeze(2)).squeeze(2)


def lowest(a: Tensor, box: Box) -> Tensor:
    """Minimum over the box of every linear function: [n, specs, ...] -> [n, specs]."""
    return _dot(a, box.center) - _dot(a.abs(), box.radius)


def highest(a: Tensor, box: Box) -> Tensor:
    """Maximum over the box of every linear function: [n, specs, ...] -> [n, specs]."""
    return _dot(a, box.center) + _dot(a.abs(), box.radius)


@dataclass(frozen=True)
class Identity:
    """Identity, and dropout in eval mode."""

    mixes: ClassVar[bool] = False

    def interval(self, *boxes: Box) -> Box:
        return boxes[0]

    def bound_backward(self, a: Tensor, boxes: tuple[Box, ...], parallel: bool) -> BackwardBound:
        return (a,), 0.0, 0.0


@dataclass(frozen=True)
class Convolution:
    """Conv2d with zero padding."""

    weight: Tensor
    bias: Tensor | None
    stride: Pair
    padding: Pair
    dilation: Pair
    groups: int

    mixes: ClassVar[bool] = True

    def interval(self, *boxes: Box) -> Box:
        (box,) = boxes
        geometry = (self.stride, self.padding, self.dilation, self.groups)
        center = F.conv2d(box.center, self.weight, self.bias, *geometry)
        radius = F.conv2d(box.radius, self.weight.abs(), None, *geometry)
        return Box(center - radius, center + radius)

    def bound_backward(self, a: Tensor, boxes: tuple[Box, ...], parallel: bool) -> BackwardBound:
        geometry = zip(self.weight.shape[-2:], self.stride, self.padding, self.dilation, strict=True)
        covered_sizes = [
            (pooled - 1) * stride - 2 * padding + dilation * (kernel - 1) + 1
            for pooled, (kernel, stride, padding, dilation) in zip(a.shape[-2:], geometry, strict=True)
        ]
        # Rows and columns at the lower right that the stride skips: output_padding of the transposed convolution.
        output_padding = [size - end for size, end in zip(boxes[0].lower.shape[-2:], covered_sizes, strict=True)]
        coefficients = F.conv_transpose2d(
            a.flatten(0, 1), self.weight, None, self.stride, self.padding, output_padding, self.groups, self.dilation
        )
        constant = 0.0 if self.bias is None else a.sum(dim=(3, 4)) @ self.bias
        return (coefficients.unflatten(0, a.shape[:2]),), constant, constant


@dataclass(frozen=True)
class Dense:
    """Linear."""

    weight: Tensor
    bias: Tensor | None

    mixes: ClassVar[bool] = True

    def interval(self, *boxes: Box) -> Box:
        center = F.linear(boxes[0].center, self.weight, self.bias)
        radius = F.linear(boxes[0].radius, self.weight.abs())
        return Box(center - radius, center + radius)

    def bound_backward(self, a: Tensor, boxes: tuple[Box, ...], parallel: bool) -> BackwardBound:
        constant = 0.0 if self.bias is None else a @ self.bias
        return (a @ self.weight,), constant, constant


@dataclass(frozen=True)
class Scale:
    """x * factor + offset, broadcast over the batch: normalisation and BatchNorm."""

    factor: Tensor
    offset: Tensor

    mixes: ClassVar[bool] = False

    def interval(self, *boxes: Box) -> Box:
        center = boxes[0].center * self.factor + self.offset
        radius = boxes[0].radius * self.factor.abs()
        return Box(center - radius, center + radius)

    def bound_backward(self, a: Tensor, boxes: tuple[Box, ...], parallel: bool) -> BackwardBound:
        constant = (a * self.offset).flatten(2).sum(dim=2)
        return (a * self.factor,), constant, constant


@dataclass(frozen=True)
class Average:
    """Average pooling of any kind: one non-negative matrix for rows and one for columns.

    `matrices` are functions of (size, like) that return [size, pooled size], or None if an axis is unchanged.
    """

    matrices: tuple[Callable[[int, Tensor], Tensor | None], Callable[[int, Tensor], Tensor | None]]

    mixes: ClassVar[bool] = True

    def _of(self, like: Tensor) -> tuple[Tensor | None, Tensor | None]:
        return self.matrices[0](like.shape[-2], like), self.matrices[1](like.shape[-1], like)

    def interval(self, *boxes: Box) -> Box:
        rows, columns = self._of(boxes[0].lower)

        def pool(values: Tensor) -> Tensor:
            values = values if rows is None else rows.T @ values
            return values if columns is None else values @ columns

        return Box(pool(boxes[0].lower), pool(boxes[0].upper))

    def bound_backward(self, a: Tensor, boxes: tuple[Box, ...], parallel: bool) -> BackwardBound:
        rows, columns = self._of(boxes[0].lower)
        a = a if rows is None else rows @ a
        return (a if columns is None else a @ columns.T,), 0.0, 0.0


@dataclass(frozen=True)
class Flatten:
    """All dimensions except the batch become one."""

    mixes: ClassVar[bool] = False

    def interval(self, *boxes: Box) -> Box:
        return Box(boxes[0].lower.flatten(1), boxes[0].upper.flatten(1))

    def bound_backward(self, a: Tensor, boxes: tuple[Box, ...], parallel: bool) -> BackwardBound:
        return (a.reshape(*a.shape[:2], *boxes[0].lower.shape[1:]),), 0.0, 0.0


@dataclass(frozen=True)
class Sum:
    """Addition of two branches, as at the end of a residual block."""

    mixes: ClassVar[bool] = True

    def interval(self, *boxes: Box) -> Box:
        first, second = boxes
        return Box(first.lower + second.lower, first.upper + second.upper)

    def bound_backward(self, a: Tensor, boxes: tuple[Box, ...], parallel: bool) -> BackwardBound:
        return (a, a), 0.0, 0.0


@dataclass(frozen=True)
class Relu:
    """max(x, 0).

    An undecided (unstable) ReLU is bounded from above by the chord over its box and from below by a line through zero:
    of slope 1 if that leaves less area, else 0 (CROWN: Zhang et al., NeurIPS 2018, table 2, adaptive choice); if
    `parallel`, of the chord's slope (Wang et al. 2018, symbolic linear relaxation).
    """

    mixes: ClassVar[bool] = True

    def interval(self, *boxes: Box) -> Box:
        return Box(boxes[0].lower.relu(), boxes[0].upper.relu())

    def bound_backward(self, a: Tensor, boxes: tuple[Box, ...], parallel: bool) -> BackwardBound:
        lower, upper = boxes[0]
        undecided = (lower < 0) & (upper > 0)
        width = upper - lower
        wide = undecided & (width > NARROW)
        mostly_on = (upper > -lower).to(lower.dtype)
        decided = torch.where(undecided, mostly_on, (lower >= 0).to(lower.dtype))
        slope = torch.where(wide, upper / torch.where(wide, width, 1.0), decided)
        # This height is sound for any slope in [0, 1], despite rounding and narrow boxes.
        height = torch.where(undecided, torch.maximum(-lower * slope, upper * (1 - slope)), 0.0)
        positive = a.relu()
        negative = a - positive
        low = _dot(negative, height)
        if parallel:
            return (a * slope.unsqueeze(1),), low, _dot(positive, height)
        below = torch.where(wide, mostly_on, slope)
        return (positive * below.unsqueeze(1) + negative * slope.unsqueeze(1),), low, float("nan")


@dataclass(frozen=True)
class MaxPool:
    """MaxPool2d without dilation.

    A window's maximum is at least its entry of highest lower bound, and at most the highest upper bound; a window is
    decided if no other entry can exceed that entry. If `parallel`, an undecided window is bounded by these two
    constants.
    """

    kernel: Pair
    stride: Pair
    padding: Pair

    mixes: ClassVar[bool] = True

    def _pool(self, values: Tensor) -> Tensor:
        return F.max_pool2d(values, self.kernel, self.stride, self.padding)

    def interval(self, *boxes: Box) -> Box:
        return Box(self._pool(boxes[0].lower), self._pool(boxes[0].upper))

    def bound_backward(self, a: Tensor, boxes: tuple[Box, ...], parallel: bool) -> BackwardBound:
        lower, upper = boxes[0]
        floor, ceiling = self._pool(lower), self._pool(upper)
        decided = self._rivals(upper, floor) == 1
        loose_floor, loose_ceiling = floor.masked_fill(decided, 0.0), ceiling.masked_fill(decided, 0.0)
        positive = a.relu()
        negative = a - positive
        if parallel:
            low = _dot(positive, loose_floor) + _dot(negative, loose_ceiling)
            high = _dot(negative, loose_floor) + _dot(positive, loose_ceiling)
            return (self._route(a * decided.unsqueeze(1), lower),), low, high
        coefficients = positive + negative * decided.unsqueeze(1)
        return (self._route(coefficients, lower),), _dot(negative, loose_ceiling), float("nan")

    def _rivals(self, upper: Tensor, floor: Tensor) -> Tensor:
        """Number of entries per window that may reach its highest lower bound; at least 1."""
        (rows, columns), (down, right) = self.padding, self.stride
        padded = F.pad(upper, (columns, columns, rows, rows), value=-torch.inf)
        windows = padded.unfold(2, self.kernel[0], down).unfold(3, self.kernel[1], right)
        return (windows >= floor[..., None, None]).flatten(4).sum(dim=4)

    def _route(self, a: Tensor, lower: Tensor) -> Tensor:
        """Coefficients of windows -> of their entries of highest lower bound, as the gradient of pooling."""
        with torch.enable_grad():
            at = lower.detach().unsqueeze(1).expand(-1, a.shape[1], -1, -1, -1).flatten(0, 1).requires_grad_()
            (coefficients,) = torch.autograd.grad(self._pool(at), at, a.flatten(0, 1), create_graph=a.requires_grad)
        return coefficients.unflatten(0, a.shape[:2])
