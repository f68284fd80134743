"""Budgets split among layers: exact totals, at least one connection per layer, densities and ranks as defined."""

from __future__ import annotations

import math
import pickle
from decimal import Decimal
from fractions import Fraction
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pipeline.models import build_network
from pipeline.models.pruning.allocation import erdos_renyi_kernel, global_masks, mask_rule, total_kept, uniform
from pipeline.models.pruning.scores import Scores
from pipeline.models.state import layer_counts, named_state
from pipeline.recipe.methods import LEARNED, Allocation
from pipeline.recipe.sections import Model

dimension = st.integers(1, 12)
shape = st.one_of(
    st.tuples(dimension, dimension), st.tuples(dimension, dimension, st.integers(1, 3), st.integers(1, 3))
)
shapes_of_layers = st.lists(shape, min_size=1, max_size=6).map(
    lambda layers: {f"layer{i}": torch.Size(dimensions) for i, dimensions in enumerate(layers)}
)
keep_fraction = st.integers(1, 1000).map(lambda thousandths: Decimal(thousandths) / 1000)


def densities(shapes: dict[str, torch.Size], budget: int) -> dict[str, float]:
    """ERK's densities by bisection on their common factor, instead of by saturating layers one by one."""
    low, high, result = 0.0, 1e9, dict[str, float]()
    for _ in range(200):
        factor = (low + high) / 2
        result = {name: min(1.0, factor * sum(s) / math.prod(s)) for name, s in shapes.items()}
        if sum(result[name] * math.prod(s) for name, s in shapes.items()) > budget:
            high = factor
        else:
            low = factor
    return result


@settings(max_examples=150)
@given(shapes=shapes_of_layers, keep=keep_fraction)
def test_erk_has_its_densities_and_an_exact_total(shapes: dict[str, torch.Size], keep: Decimal) -> None:
    counts = erdos_renyi_kernel(shapes, keep)
    sizes = {name: math.prod(s) for name, s in shapes.items()}
    n = sum(sizes.values())
    budget = max(n - math.floor((1 - Fraction(keep)) * n), len(shapes))
    assert sum(counts.values()) == budget == total_kept(shapes, keep)
    assert all(1 <= counts[name] <= sizes[name] for name in shapes)
    targets = {name: density * sizes[name] for name, density in densities(shapes, budget).items()}
    minimum_excess = sum(1 - value for value in targets.values() if value < 1)  # raised to 1 at the others' expense
    assert all(abs(counts[name] - value) <= 1 + minimum_excess + 1e-6 for name, value in targets.items())


def test_uniform_matches_the_paper() -> None:
    shapes = {"conv1.weight": torch.Size([64, 3, 7, 7]), "fc.weight": torch.Size([1000, 2048])}
    assert uniform(shapes, Decimal("0.01")) == {"conv1.weight": 95, "fc.weight": 20480}  # as the reference code keeps


@settings(max_examples=150)
@given(data=st.data(), shapes=shapes_of_layers, keep=keep_fraction)
def test_global_masks_are_the_strongest_of_all_and_one_of_each(
    data: st.DataObject, shapes: dict[str, torch.Size], keep: Decimal
) -> None:
    values = st.integers(-3, 3)  # many ties
    scores = {
        name: torch.tensor(data.draw(st.lists(values, min_size=s.numel(), max_size=s.numel()))).float().view(s)
        for name, s in shapes.items()
    }
    budget = total_kept(shapes, keep)
    masks = global_masks(scores, budget)
    entries = [(name, i, abs(v)) for name in scores for i, v in enumerate(scores[name].flatten().tolist())]
    firsts = {name: max((v, -i) for other, i, v in entries if other == name) for name in scores}
    ranked = sorted(range(len(entries)), key=lambda e: (firsts[entries[e][0]] != _key(entries[e]), -entries[e][2], e))
    kept = {entries[e][:2] for e in ranked[:budget]}
    actual = {(name, i) for name in masks for i, bit in enumerate(masks[name].flatten().tolist()) if bit}
    assert actual == kept


def _key(entry: tuple[str, int, float]) -> tuple[float, int]:
    return entry[2], -entry[1]


@pytest.mark.parametrize("allocation", get_args(Allocation))
@pytest.mark.parametrize(
    ("arch", "keep"),
    [("resnet18", "0.1"), ("resnet18", "0.01"), ("resnet18", "0.001"), ("wrn_28_4", "0.01"), ("cnn_large", "0.01")],
)
def test_every_layer_of_a_network_keeps_something_and_the_total_is_exact(
    arch: str, keep: str, allocation: Allocation
) -> None:
    """Includes small layers: 1 % of the 432 connections of wrn_28_4's first convolution is 4.3."""
    network = build_network(Model(arch=arch, num_classes=10), 0, 32)
    Scores.attach(network, Decimal(keep), allocation)
    counts = layer_counts(network)
    assert min(entry["kept"] for entry in counts) >= 1
    n = sum(entry["total"] for entry in counts)
    if allocation == "uniform":
        assert all(e["kept"] == e["total"] - math.floor((1 - Fraction(keep)) * e["total"]) for e in counts)
    else:
        assert sum(entry["kept"] for entry in counts) == n - math.floor((1 - Fraction(keep)) * n)


def test_a_global_mask_follows_the_scores_from_layer_to_layer() -> None:
    network = nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 10))
    scores = Scores.attach(network, Decimal("0.5"), "global")
    state = named_state(network)
    with torch.no_grad():
        state["score/0.weight"].fill_(2.0)
        state["score/1.weight"].fill_(1.0)
    scores.refresh()
    assert [entry["kept"] for entry in layer_counts(network)] == [99, 1]
    with torch.no_grad():
        state["score/1.weight"][3, 4] = math.nan
    with pytest.raises(ValueError, match=r"^1\.weight: scores contain NaN"):
        scores.refresh()


@pytest.mark.parametrize("allocation", get_args(Allocation))
def test_a_mask_rule_can_be_pickled(allocation: Allocation) -> None:
    scores = {"a": torch.linspace(-1, 1, 20).view(4, 5), "b": torch.linspace(0, 3, 12).view(3, 4)}
    rates = {name: torch.zeros(1) for name in scores} if allocation in LEARNED else {}
    rule = mask_rule({name: score.shape for name, score in scores.items()}, Decimal("0.3"), allocation)
    expected, masks = rule(scores, rates), pickle.loads(pickle.dumps(rule))(scores, rates)
    assert all(torch.equal(masks[name], mask) for name, mask in expected.items())
