"""HARP (Zhao and Wressnegger, ICLR 2023): each layer's share of connections learns, under a penalty for the budget.

A layer has one number k, and keeps the share sigmoid(k) (1 - floor) + floor of its connections. While it learns, only
the penalty draws the total towards the budget, from above. The constants are those of the authors' code.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from decimal import Decimal
from fractions import Fraction

import torch
from torch import Tensor

START = 0.1
"""Share that every layer keeps at first; the budget's if that is larger, so that no network is pruned beyond it."""
FLOOR = 0.1
"""Smallest share of a layer, in multiples of keep_fraction."""
GAMMA = 0.01
"""Weight of the penalty in the first epoch, as on CIFAR-10; the authors have 0.1 on ImageNet, with 5 epochs."""
MET = 5e-5
"""A penalty up to this is printed as 0.0000 by the authors' code, which then keeps the weight."""


def floor_of(keep_fraction: Decimal | Fraction) -> float:
    return FLOOR * float(keep_fraction)


def share_of(k: Tensor, floor: float) -> Tensor:
    """The share of its connections that a layer keeps, in (floor, 1), of k's shape; differentiable."""
    return torch.sigmoid(k) * (1.0 - floor) + floor


def first_k(keep_fraction: Decimal) -> float:
    """The k of START, with sigmoid(k) at most 0.99, as in the authors' code: at 1, k were infinite."""
    floor = floor_of(keep_fraction)
    value = min((max(START, float(keep_fraction)) - floor) / (1.0 - floor), 0.99)
    return math.log(value / (1.0 - value))


@torch.no_grad()
def shares(rates: Mapping[str, Tensor], floor: float) -> dict[str, float]:
    """k [1] per layer -> the share of its connections that it keeps. One transfer from the device.

    Computed on the CPU, so that counts do not depend on the device. Errors: ValueError naming a layer whose k is NaN.
    """
    values = share_of(torch.cat(list(rates.values())).to("cpu", torch.float64), floor).tolist()
    for name, value in zip(rates, values, strict=True):
        if math.isnan(value):
            raise ValueError(f"{name}: the layer's rate is NaN; lower the learning rate of the prune phase")
    return dict(zip(rates, values, strict=True))


class BudgetPenalty:
    """gamma max(0, kept / budget - 1), where kept is the sum of share times size over the layers.

    gamma is GAMMA times the number of the epoch, from 1 on, until the penalty without it is met at the end of an epoch,
    and constant afterwards. That constant is the only state: a function of rates, which are equal on all workers.
    """

    prefix = "penalty/"

    def __init__(self, rates: Mapping[str, Tensor], sizes: Mapping[str, int], budget: int, floor: float) -> None:
        self._rates, self._floor = list(rates.values()), floor
        self._per_budget = torch.tensor([sizes[name] / budget for name in rates])
        self._constant: float | None = None

    def excess(self) -> Tensor:
        """max(0, kept / budget - 1): a scalar with its graph to the rates."""
        rates = torch.cat(self._rates)
        self._per_budget = self._per_budget.to(rates)
        kept = (share_of(rates, self._floor) * self._per_budget).sum()
        return torch.relu(kept - 1.0)

    def at(self, step: int, steps_per_epoch: int) -> Tensor:
        """To be added to the mean loss of every micro-batch of a step, counted from 0."""
        epoch, excess = step // steps_per_epoch, self.excess()
        starts_epoch = step > 0 and step % steps_per_epoch == 0
        if self._constant is None and starts_epoch and float(excess.detach()) <= MET:
            self._constant = GAMMA * epoch  # the weight of the epoch that met it
        return (GAMMA * (epoch + 1) if self._constant is None else self._constant) * excess

    def state(self) -> dict[str, Tensor]:
        """'penalty/gamma' [], float64, once it is constant."""
        if self._constant is None:
            return {}
        return {"penalty/gamma": torch.tensor(self._constant, dtype=torch.float64)}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        self._constant = float(tensors["penalty/gamma"]) if tensors else None
