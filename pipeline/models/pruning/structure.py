"""Structures: which connections are kept or pruned together, and how masks follow from scores under each.

A unit is what is kept or pruned as a whole: a connection, or a block of them. Allocations count and rank units by the
sum of |score| over their connections. A structure that ranks otherwise has a mask rule of its own. A layer that a
structure does not fit is unstructured, and keeps the same fraction whatever the allocation: its connections are not
compared with units of another size, so that all totals are exact.
"""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Decimal
from fractions import Fraction
from functools import partial

import torch
from torch import Tensor

from pipeline.models.pruning.allocation import MaskRule, mask_rule
from pipeline.models.pruning.topk import kept_count, n_of_m_mask
from pipeline.recipe.methods import Allocation, n_of_m
from pipeline.recipe.methods import Structure as StructureName

Shapes = Mapping[str, torch.Size]
"""Plain weight name -> shape, of every maskable layer of a network."""


class Structure:
    """Every connection is a unit: no structure. The others derive from it."""

    def __init__(self, shapes: Shapes) -> None:
        self.shapes = {name: shape for name, shape in shapes.items() if self.fits(shape)}
        """Of the layers that have the structure; allocations are among them."""
        self.others = {name: shape for name, shape in shapes.items() if name not in self.shapes}
        """Of those that are unstructured instead."""

    def fits(self, shape: torch.Size) -> bool:
        """Whether a layer whose weight has this shape has the structure."""
        return True

    def mask_rule(self, keep_fraction: Decimal | Fraction, allocation: Allocation, exact: bool = True) -> MaskRule:
        """See `allocation.mask_rule`; picklable."""
        parts = {}
        if self.shapes:
            parts[tuple(self.shapes)] = self._own_rule(keep_fraction, allocation, exact)
        if self.others:
            parts[tuple(self.others)] = mask_rule(self.others, keep_fraction, "uniform")
        return next(iter(parts.values())) if len(parts) == 1 else partial(_join, parts)

    def check_budget(self, keep_fraction: Decimal | Fraction) -> None:
        """Errors: ValueError if no network of the structure is as small as that."""

    def _own_rule(self, keep_fraction: Decimal | Fraction, allocation: Allocation, exact: bool) -> MaskRule:
        """The rule of the layers that have the structure."""
        return mask_rule(self.shapes, keep_fraction, allocation, exact=exact)

    @property
    def unit_shapes(self) -> Shapes:
        """Of the units of the layers that have the structure."""
        return self.shapes

    def units(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Plain weight name -> one value per unit, of the tensor's dtype: the sum of |value| over its connections.

        `tensors` have the weights' shapes. Sums are taken in one order on every device.
        """
        return {name: tensor.abs() for name, tensor in tensors.items()}

    def connections(self, kept: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Masks of the weights' shapes from one bool per unit, of the shapes of `units`."""
        return dict(kept)


class Blocks(Structure):
    """Blocks of `rows` outputs times `columns` inputs of a weight flattened to [O, I K K]."""

    def __init__(self, shapes: Shapes, rows: int, columns: int) -> None:
        self._rows, self._columns = rows, columns
        super().__init__(shapes)

    def fits(self, shape: torch.Size) -> bool:
        return shape[0] % self._rows == 0 and shape[1:].numel() % self._columns == 0

    def _own_rule(self, keep_fraction: Decimal | Fraction, allocation: Allocation, exact: bool) -> MaskRule:
        return partial(self._masks, mask_rule(self.shapes, keep_fraction, allocation, self.unit_shapes, exact))

    @property
    def unit_shapes(self) -> Shapes:
        return {name: self._unit_shape(shape) for name, shape in self.shapes.items()}

    def _unit_shape(self, shape: torch.Size) -> torch.Size:
        return torch.Size([shape[0] // self._rows, shape[1:].numel() // self._columns])

    def _masks(self, rule: MaskRule, scores: Mapping[str, Tensor], rates: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return self.connections(rule(self.units({name: score.detach() for name, score in scores.items()}), rates))

    def units(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: self._sums(t.abs()) if name in self.shapes else t.abs() for name, t in tensors.items()}

    def _sums(self, tensor: Tensor) -> Tensor:
        (outputs, inputs), rows, columns = self._unit_shape(tensor.shape), self._rows, self._columns
        blocks = tensor.reshape(outputs, rows, inputs, columns).transpose(1, 2)
        return _fold(blocks.reshape(outputs, inputs, rows * columns))

    def connections(self, kept: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {
            name: self._spread(mask, self.shapes[name]) if name in self.shapes else mask for name, mask in kept.items()
        }

    def _spread(self, kept: Tensor, shape: torch.Size) -> Tensor:
        return kept.repeat_interleave(self._rows, 0).repeat_interleave(self._columns, 1).view(shape)


class GroupsOfInputs(Structure):
    """N of every M consecutive input channels, in every output and position of the kernel.

    At a keep_fraction k of its own, N = M - floor((1 - k) M). It leaves nothing to allocate.
    """

    def __init__(self, shapes: Shapes, size: int) -> None:
        self._size = size
        super().__init__(shapes)

    def fits(self, shape: torch.Size) -> bool:
        return shape[1] % self._size == 0

    def _own_rule(self, keep_fraction: Decimal | Fraction, allocation: Allocation, exact: bool) -> MaskRule:
        assert allocation == "uniform", "the recipe's validation"
        return partial(_n_of_m_masks, kept_count(self._size, keep_fraction), self._size)

    def units(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        raise AssertionError("units are of equal rank only within a group")


def build_structure(name: StructureName, shapes: Shapes) -> Structure:
    """Of a network whose maskable weights have these shapes."""
    if name == "unstructured":
        return Structure(shapes)
    if pattern := n_of_m(name):
        return GroupsOfInputs(shapes, pattern[1])
    rows, columns = map(int, name.split("x"))
    return Blocks(shapes, rows, columns)


def _join(
    parts: Mapping[tuple[str, ...], MaskRule], scores: Mapping[str, Tensor], rates: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    masks: dict[str, Tensor] = {}
    for names, rule in parts.items():
        own_rates = {name: rates[name] for name in names if name in rates}
        masks |= rule({name: scores[name] for name in names}, own_rates)
    return {name: masks[name] for name in scores}


def _n_of_m_masks(n: int, m: int, scores: Mapping[str, Tensor], rates: Mapping[str, Tensor]) -> dict[str, Tensor]:
    masks = {}
    for name, score in scores.items():
        try:
            masks[name] = n_of_m_mask(score, n, m)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    return masks


def _fold(values: Tensor) -> Tensor:
    """Sums over the last dimension, whose size is a power of 2: by halves, which is one order on every device and for
    any number of threads."""
    while values.shape[-1] > 1:
        first, second = values.chunk(2, -1)
        values = first + second
    return values.squeeze(-1)
