"""Masks under a structure, against a brute-force statement: exact counts in every group and block, the largest kept."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
from decimal import Decimal
from fractions import Fraction
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.models import build_network
from pipeline.models.pruning.allocation import erdos_renyi_kernel
from pipeline.models.pruning.score_init import first_scores
from pipeline.models.pruning.scores import Scores, check_structures
from pipeline.models.pruning.structure import build_structure
from pipeline.models.pruning.topk import n_of_m_mask
from pipeline.models.state import layer_counts, named_state, train_only
from pipeline.recipe.methods import Allocation, Structure, density_of, n_of_m
from pipeline.recipe.sections import Model

N_OF_M: list[Structure] = ["2:4", "1:4", "4:8"]
BLOCKS: list[Structure] = ["1x4", "4x1", "16x16"]
SHAPES = {"odd": (6, 3, 3, 3), "conv": (8, 8, 3, 3), "large": (16, 32, 2, 2), "linear": (32, 64), "last": (10, 64)}
"""3 and 6 and 10 are divided by no M and not by 4."""


def kept_of(count: int, keep: Fraction | Decimal) -> int:
    return count - math.floor((1 - Fraction(keep)) * count)


def tied_scores(seed: int, shapes: dict[str, tuple[int, ...]] = SHAPES) -> dict[str, Tensor]:
    """Few different values, so that most are tied; zeros and both signs among them."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randint(-3, 4, shape, generator=generator).float() for name, shape in shapes.items()}


def largest(values: np.ndarray, kept: int) -> set[int]:
    """The indices of the `kept` largest; of equal ones the first."""
    return set(sorted(range(len(values)), key=lambda i: (-values[i], i))[:kept])


def blocks_of(values: np.ndarray, structure: Structure) -> list[list[int]] | None:
    """Flat indices of each block of a weight, row by row; None if its blocks do not divide it."""
    rows, columns = map(int, structure.split("x"))
    outputs, inputs = len(values), values[0].size
    if outputs % rows or inputs % columns:
        return None
    corners = itertools.product(range(0, outputs, rows), range(0, inputs, columns))
    return [[(o + r) * inputs + i + c for r in range(rows) for c in range(columns)] for o, i in corners]


@settings(max_examples=60, deadline=None)
@given(
    outputs=st.integers(1, 3),
    groups=st.integers(1, 3),
    kernel=st.sampled_from([(), (1, 1), (2, 3)]),
    size=st.integers(1, 9),
    data=st.data(),
    channels_last=st.booleans(),
)
def test_n_of_every_m_inputs_stay(
    outputs: int, groups: int, kernel: tuple[int, ...], size: int, data: st.DataObject, channels_last: bool
) -> None:
    kept, shape = data.draw(st.integers(1, size)), (outputs, groups * size, *kernel)
    values = data.draw(st.lists(st.integers(-2, 2), min_size=math.prod(shape), max_size=math.prod(shape)))
    score = torch.tensor(values).float().view(shape)
    if channels_last and kernel:
        score = score.to(memory_format=torch.channels_last)
    mask = n_of_m_mask(score, kept, size)
    assert mask.shape == score.shape
    for output, *position in itertools.product(range(outputs), *map(range, kernel)):
        where = (output, slice(None), *position)
        along, bits = score[where].abs().tolist(), mask[where].tolist()
        for start in range(0, len(along), size):
            chosen = {i for i in range(size) if bits[start + i]}
            assert chosen == largest(np.array(along[start : start + size]), kept), (where, start)


@pytest.mark.parametrize("structure", N_OF_M)
def test_a_network_has_n_of_m_where_m_divides_the_inputs_and_the_same_fraction_elsewhere(structure: Structure) -> None:
    (n, m), scores = n_of_m(structure) or (0, 0), tied_scores(1)
    density = Fraction(n, m)
    assert density == density_of(structure)
    shapes = {name: score.shape for name, score in scores.items()}
    masks = build_structure(structure, shapes).mask_rule(density, "uniform")(scores, {})
    assert list(masks) == list(scores)
    for name, score in scores.items():
        assert int(masks[name].sum()) == kept_of(score.numel(), density), "the count of an unstructured layer"
        if score.shape[1] % m == 0:
            assert torch.equal(masks[name], n_of_m_mask(score, n, m))
        else:
            chosen = largest(score.abs().flatten().numpy(), kept_of(score.numel(), density))
            assert set(masks[name].flatten().nonzero().flatten().tolist()) == chosen


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    keep=st.integers(1, 100).map(lambda n: Fraction(n, 100)),
    structure=st.sampled_from(BLOCKS),
)
def test_the_blocks_of_largest_sums_stay(seed: int, keep: Fraction, structure: Structure) -> None:
    scores = tied_scores(seed)
    masks = build_structure(structure, {n: s.shape for n, s in scores.items()}).mask_rule(keep, "uniform")(scores, {})
    for name, score in scores.items():
        values, kept = score.abs().numpy(), set(masks[name].flatten().nonzero().flatten().tolist())
        blocks = blocks_of(values, structure) or [[i] for i in range(values.size)]
        sums = np.array([values.reshape(-1)[block].sum() for block in blocks])
        expected = largest(sums, kept_of(len(blocks), keep))
        assert kept == {i for block in expected for i in blocks[block]}


@pytest.mark.parametrize("structure", BLOCKS)
@pytest.mark.parametrize("allocation", get_args(Allocation))
def test_blocks_have_every_allocations_budget(structure: Structure, allocation: Allocation) -> None:
    """Blocks compete with blocks, and the connections of layers that have none with one another."""
    layers = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 32, 3), nn.Conv2d(32, 32, 3), nn.Linear(96, 32), nn.Linear(32, 10)
    network, keep = nn.Sequential(*layers), Decimal("0.1")
    scores = Scores.attach(network, keep, allocation, first_scores("random", 0), structure)
    masks, shapes = scores.masks(), {name: mask.shape for name, mask in scores.masks().items()}
    blocks = {name: blocks_of(np.empty(shape, np.bool_), structure) for name, shape in shapes.items()}
    counts: dict[bool, dict[str, tuple[int, int]]] = {True: {}, False: {}}
    for name, mask in masks.items():
        flat, parts = mask.flatten().numpy(), blocks[name]
        if parts is None:
            counts[False][name] = int(flat.sum()), flat.size
        else:
            whole = flat[np.array(parts)]
            assert (whole.all(1) | ~whole.any(1)).all(), "a block stays or goes as a whole"
            counts[True][name] = int(whole.all(1).sum()), len(parts)
    assert counts[True]
    assert counts[False], "the first convolution has 27 inputs, the last layer 10 outputs"
    for group in counts.values():
        assert all(kept >= 1 for kept, _ in group.values())
        if allocation == "uniform":
            assert all(kept == kept_of(units, keep) for kept, units in group.values())
        else:
            total = kept_of(sum(units for _, units in group.values()), keep)
            assert sum(kept for kept, _ in group.values()) == max(total, len(group))
    if allocation == "erk":
        names = counts[True]
        units = {name: torch.Size([names[name][1]]) for name in names}
        expected = erdos_renyi_kernel({name: shapes[name] for name in names}, keep, units)
        assert {name: kept for name, (kept, _) in names.items()} == expected


def test_units_are_sums_in_one_order_on_any_number_of_threads() -> None:
    """In float32, in which another order would give another sum."""
    score = {"a": torch.randn(64, 64, 3, 3, generator=torch.Generator().manual_seed(0))}
    structure = build_structure("16x16", {"a": score["a"].shape})
    threads, sums = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            sums.append(structure.units(score)["a"])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(sums[0], sums[1])
    assert torch.equal(sums[0], sums[2])
    exact = [score["a"].abs().double().flatten()[block].sum() for block in blocks_of(score["a"].numpy(), "16x16") or []]
    assert torch.allclose(sums[0].double().flatten(), torch.stack(exact), rtol=1e-6)


@pytest.mark.parametrize("structure", [*N_OF_M, *BLOCKS])
def test_channels_last_and_copies_of_a_rule_make_the_same_masks(structure: Structure) -> None:
    scores = tied_scores(2)
    rule = build_structure(structure, {n: s.shape for n, s in scores.items()}).mask_rule(Decimal("0.5"), "uniform")
    masks = rule(scores, {})
    last = {n: s.to(memory_format=torch.channels_last) if s.dim() == 4 else s for n, s in scores.items()}
    for other in (rule(last, {}), pickle.loads(pickle.dumps(rule))(scores, {}), copy.deepcopy(rule)(scores, {})):
        assert all(torch.equal(masks[name], other[name]) for name in scores)


@pytest.mark.parametrize("structure", ["2:4", "4x1"])
def test_the_gradient_is_straight_through(structure: Structure) -> None:
    """dL/ds = dL/dw_eff * w * sign(s) for kept and pruned connections alike, as without a structure."""
    torch.manual_seed(0)
    layer, x = nn.Conv2d(8, 4, 3, bias=False), torch.rand(2, 8, 5, 5)
    weight, network = layer.weight.detach().clone(), nn.Sequential(layer)
    scores = Scores.attach(network, Decimal("0.5"), "uniform", first_scores("random", 3), structure)
    train_only(network.train(), "scores")
    (mask,), (score,) = scores.masks().values(), scores.parameters().values()
    assert int(mask.sum()) == mask.numel() // 2
    network(x).square().sum().backward()
    effective = (weight * mask).requires_grad_()
    F.conv2d(x, effective).square().sum().backward()
    assert effective.grad is not None
    assert score.grad is not None
    assert torch.allclose(score.grad, effective.grad * weight * score.detach().sign(), rtol=1e-5, atol=1e-6)
    assert bool((score.grad != 0).all())


def test_masks_follow_the_scores() -> None:
    network = nn.Sequential(nn.Linear(8, 2, bias=False))
    scores = Scores.attach(network, Decimal("0.25"), "uniform", first_scores("ones", 0), "1:4")
    assert scores.masks()["0.weight"].tolist() == [[True, False, False, False] * 2] * 2, "ties go to the first"
    with torch.no_grad():
        named_state(network)["score/0.weight"][1, 6] = -2.0
    scores.refresh()
    assert scores.masks()["0.weight"].tolist()[1] == [True, False, False, False, False, False, True, False]


@pytest.mark.parametrize("structure", [*N_OF_M, *BLOCKS])
def test_nan_names_the_layer(structure: Structure) -> None:
    scores = tied_scores(3) | {"bad": torch.ones(16, 16)}
    scores["bad"][3, 4] = math.nan
    rule = build_structure(structure, {n: s.shape for n, s in scores.items()}).mask_rule(Decimal("0.5"), "uniform")
    with pytest.raises(ValueError, match="bad: scores contain NaN; lower the learning rate"):
        rule(scores, {})


def test_an_earlier_keep_fraction_has_more_of_every_group() -> None:
    """As gradual pruning needs: from M of M down to N, so that what is pruned stays so."""
    scores, before = tied_scores(4, {"a": (8, 8)}), torch.ones(8, 8, dtype=torch.bool)
    structure = build_structure("2:4", {"a": torch.Size((8, 8))})
    for keep, n in (
        (Fraction(1), 4),
        (Fraction(4, 5), 4),
        (Fraction(3, 4), 3),
        (Fraction(3, 5), 3),
        (Fraction(1, 2), 2),
    ):
        mask = structure.mask_rule(keep, "uniform")(scores, {})["a"]
        assert torch.equal(mask.view(8, 2, 4).sum(-1), torch.full((8, 2), n))
        assert not (mask & ~before).any()
        before = mask


def test_harps_layers_keep_their_shares_of_blocks_while_they_learn() -> None:
    network = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False))
    scores = Scores.attach(network, Decimal("0.1"), "harp", first_scores("random", 0), "1x4")
    assert scores.follow_shares() is not None
    with torch.no_grad():
        named_state(network)["rate/0.weight"].fill_(0.0)
    scores.refresh()
    first, second = (mask.view(-1, 4).all(1) for mask in scores.masks().values())
    share = 0.5 * (1 - 0.01) + 0.01
    assert [int(first.sum()), int(second.sum())] == [
        1024 - math.floor((1 - share) * 1024),
        kept_of(1024, Decimal("0.1")),
    ]
    with scores.within_budget():
        assert sum(int(mask.sum()) for mask in scores.masks().values()) == 4 * kept_of(2048, Decimal("0.1"))


def test_a_structure_that_no_layer_has_is_refused() -> None:
    network = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Flatten(), nn.Linear(54, 10))
    check_structures(network, ["unstructured"])
    with pytest.raises(ValueError, match="structure 2:4 divides no Conv2d and no Linear of the network; use a smaller"):
        check_structures(network, ["unstructured", "2:4"])


@pytest.mark.parametrize("structure", [*N_OF_M, *BLOCKS])
def test_counts_of_a_network_are_exact(structure: Structure) -> None:
    network, keep = (
        build_network(Model(arch="small_cnn", num_classes=10), 0, 28),
        density_of(structure) or Fraction(1, 10),
    )
    Scores.attach(network, Decimal(str(float(keep))), "uniform", structure=structure)
    for entry in layer_counts(network):
        size = math.prod(map(int, structure.split("x"))) if structure in BLOCKS else 1
        assert entry["kept"] in {kept_of(entry["total"], keep), size * kept_of(entry["total"] // size, keep)}
