"""Flying Bird's exchange against a brute-force statement of it."""

from __future__ import annotations

import math
from decimal import Decimal
from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from pipeline.models.pruning.allocation import erdos_renyi_kernel, total_kept, uniform
from pipeline.models.pruning.drop_and_grow import drop_and_grow, exchange_counts, first_masks
from pipeline.models.pruning.score_init import first_scores, uniform_draws
from pipeline.models.pruning.scores import Scores
from pipeline.recipe.methods import LEARNED, Allocation
from pipeline.rng import sample_keys, uniforms


@given(st.data(), st.integers(1, 30))
def test_the_smallest_are_dropped_and_the_largest_draws_are_grown(data: st.DataObject, size: int) -> None:
    weights = data.draw(st.lists(st.sampled_from([-2.0, -1.0, 0.0, 0.5, 1.0]), min_size=size, max_size=size))
    draws = data.draw(st.lists(st.sampled_from([0.0, 0.25, 0.5, 0.75]), min_size=size, max_size=size))
    mask = data.draw(st.lists(st.booleans(), min_size=size, max_size=size))
    kept = [i for i in range(size) if mask[i]]
    pruned = [i for i in range(size) if not mask[i]]
    drop, grow = data.draw(st.integers(0, len(kept))), data.draw(st.integers(0, len(pruned)))
    dropped = sorted(kept, key=lambda i: (abs(weights[i]), -i))[:drop]
    grown = sorted(pruned, key=lambda i: (-draws[i], i))[:grow]
    after = drop_and_grow(torch.tensor(weights), torch.tensor(mask), drop, grow, torch.tensor(draws))
    assert {i for i in range(size) if after[i]} == set(kept) - set(dropped) | set(grown)


@given(st.data(), st.integers(1, 2000), st.floats(0.005, 0.5))
def test_as_many_are_grown_as_dropped_but_for_what_is_asked(data: st.DataObject, size: int, fraction: float) -> None:
    kept = data.draw(st.integers(1, size))
    drop, grow = exchange_counts(kept, size, fraction)
    assert drop == grow == min(math.ceil(fraction * kept), size - kept), "a dense layer has nothing to grow"
    fewer, more = data.draw(st.integers(0, kept - 1)), data.draw(st.integers(0, size - kept))
    drop, grow = exchange_counts(kept, size, fraction, fewer, more)
    assert kept - drop + grow == kept - fewer + more
    assert fewer <= drop <= kept
    assert more <= grow <= size - kept


def test_draws_are_those_of_the_key() -> None:
    weight = torch.zeros(3, 2, 2, 2)
    draws = uniform_draws(weight, 7, "grow", "keep-0.1/flying_bird", "conv1.weight", 12)
    keys = sample_keys(torch.arange(3).numpy(), 7, "grow", "keep-0.1/flying_bird", "conv1.weight", 12)
    assert torch.equal(draws, torch.from_numpy(uniforms(keys, 8)).float().view(3, 2, 2, 2))
    assert not torch.equal(draws, uniform_draws(weight, 7, "grow", "keep-0.1/flying_bird", "conv1.weight", 13))


@pytest.mark.parametrize("allocation", [each for each in get_args(Allocation) if each not in LEARNED])
def test_binary_scores_keep_the_budget_of_the_allocation(allocation: Allocation) -> None:
    network, keep = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(32, 10)), Decimal("0.3")
    shapes = {name: tensor.shape for name, tensor in network.named_parameters() if name.endswith("weight")}
    init = first_masks(network, keep, allocation, first_scores("random", 0))
    masks = Scores.attach(network, keep, "binary", init).masks()
    counts = {name: int(mask.sum()) for name, mask in masks.items()}
    if allocation == "global":
        assert sum(counts.values()) == total_kept(shapes, keep)
    else:
        assert counts == {"uniform": uniform, "erk": erdos_renyi_kernel}[allocation](shapes, keep)
