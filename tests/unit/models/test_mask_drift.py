"""Mask drift against a count connection by connection, with and without interruptions."""

from __future__ import annotations

from decimal import Decimal
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pipeline.models.pruning.mask_drift import PREFIX, MaskDrift
from pipeline.models.pruning.score_init import DRAWS, first_scores, zero
from pipeline.models.pruning.scores import Scores
from pipeline.models.state import load_state, named_state
from pipeline.recipe.methods import Allocation

CPU = torch.device("cpu")
KINDS = ("scaled", *DRAWS)
ALLOCATIONS = get_args(Allocation)


def small_network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 5, 3), nn.Flatten(), nn.Linear(20, 7))


def kept(scores: Scores) -> set[tuple[str, int]]:
    return kept_by(scores.masks())


def kept_by(masks: dict[str, Tensor]) -> set[tuple[str, int]]:
    return {(name, int(i)) for name, mask in masks.items() for i in mask.flatten().nonzero()}


def move_scores(network: nn.Module, scores: Scores, amount: float) -> None:
    for name, tensor in named_state(network).items():
        if name.startswith(("score/", "rate/")):
            tensor.data += amount * torch.randn_like(tensor)
    scores.refresh()


@pytest.mark.parametrize("allocation", ALLOCATIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_initial_masks_are_recomputed_from_the_weights(kind: str, allocation: Allocation) -> None:
    network, first = small_network(), first_scores(kind, seed=3)
    scores = Scores.attach(network, Decimal("0.2"), allocation, first)
    initial_masks = {name: mask.clone() for name, mask in scores.masks().items()}
    move_scores(network, scores, 1.0)
    assert kept(scores) != kept_by(initial_masks)
    state = {name: tensor.clone() for name, tensor in named_state(network).items()}

    resumed = small_network(seed=9)  # as on resume: other weights, then those of the checkpoint
    resumed_scores = Scores.attach(resumed, Decimal("0.2"), allocation, zero)
    load_state(resumed, state, resumed_scores)
    drift = MaskDrift(resumed_scores, first, CPU)
    assert all(torch.equal(drift.start[name], mask) for name, mask in initial_masks.items())
    assert all(torch.equal(tensor, state[name]) for name, tensor in named_state(resumed).items())
    assert kept(resumed_scores) == kept(scores)


@settings(max_examples=25)
@given(
    seed=st.integers(0, 1000),
    events=st.lists(st.sampled_from(["step", "row", "interrupted"]), max_size=12),
    allocation=st.sampled_from(ALLOCATIONS),
)
def test_shares_match_a_count_and_do_not_depend_on_interruptions(
    seed: int, events: list[str], allocation: Allocation
) -> None:
    first = first_scores("scaled", 0)
    network = small_network()
    scores = Scores.attach(network, Decimal("0.3"), allocation, first)
    drift = MaskDrift(scores, first, CPU)
    start = row = kept(scores)
    torch.manual_seed(seed)
    for event in [*events, "row"]:
        if event == "step":
            move_scores(network, scores, 0.3)
        elif event == "row":
            now, shares = kept(scores), drift.measured()
            assert shares["since_start"] == pytest.approx(len(start - now) / len(start), abs=1e-12)
            assert shares["since_row"] == pytest.approx(len(row - now) / len(row), abs=1e-12)
            row = now
        else:
            state: dict[str, Tensor] = {name: t.clone() for name, t in named_state(network).items()}
            saved_state = drift.state()
            network = small_network(seed=1)
            scores = Scores.attach(network, Decimal("0.3"), allocation, zero)
            load_state(network, state, scores)
            drift = MaskDrift(scores, first, CPU)
            drift.load(saved_state)


def test_a_checkpoint_holds_a_bit_per_connection() -> None:
    scores = Scores.attach(small_network(), Decimal("0.3"))
    saved_state = MaskDrift(scores, first_scores("scaled", 0), CPU).state()
    assert {name: (len(t), t.dtype) for name, t in saved_state.items()} == {
        f"{PREFIX}0.weight": (17, torch.uint8),  # 135 connections
        f"{PREFIX}2.weight": (18, torch.uint8),  # 140
    }


def test_memory_formats_agree() -> None:
    shares = []
    for memory in (torch.contiguous_format, torch.channels_last):
        network = small_network()
        convolution = network[0]
        assert isinstance(convolution, nn.Conv2d)
        convolution.weight = nn.Parameter(convolution.weight.detach().contiguous(memory_format=memory))
        scores = Scores.attach(network, Decimal("0.3"))
        first = first_scores("scaled", 0)
        drift = MaskDrift(scores, first, CPU)
        torch.manual_seed(5)
        for name, tensor in sorted(named_state(network).items()):
            if name.startswith("score/"):
                tensor.data += torch.randn(tensor.shape)
        scores.refresh()
        drift.measured()
        saved_state = drift.state()
        drift = MaskDrift(scores, first, CPU)
        drift.load(saved_state)
        shares.append(drift.measured())
    assert shares[0] == shares[1]
    assert shares[0]["since_row"] == 0.0
    assert shares[0]["since_start"] != 0.0


def test_a_checkpoint_may_have_no_last_row_masks() -> None:
    drift = MaskDrift(Scores.attach(small_network(), Decimal("0.3")), first_scores("scaled", 0), CPU)
    drift.load({})
    assert drift.state() == {}
    assert drift.measured() == {"since_start": 0.0, "since_row": None}
    assert drift.measured() == {"since_start": 0.0, "since_row": 0.0}
