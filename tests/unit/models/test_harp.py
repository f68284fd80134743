"""HARP: shares, gradients and penalty against their formulas, and the exact budget of a finished network."""

from __future__ import annotations

import math
from collections.abc import Iterable
from decimal import Decimal
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.models import build_network
from pipeline.models.ema import Ema
from pipeline.models.pruning.harp import BudgetPenalty
from pipeline.models.pruning.score_init import zero
from pipeline.models.pruning.scores import Scores
from pipeline.models.state import effective_state, layer_counts, load_state, named_state, train_only
from pipeline.recipe.methods import Allocation
from pipeline.recipe.sections import Model

KEEP = Decimal("0.2")
FLOOR = 0.02
NAMES = ("0.weight", "2.weight")
SIZES = (30, 15)
ALLOCATIONS: tuple[Allocation, Allocation] = ("harp", "uniform")
X = torch.linspace(-1, 1, 24, dtype=torch.float64).view(4, 6).sin()


def two_layers(keep: Decimal = KEEP) -> tuple[nn.Module, Scores, dict[str, Tensor]]:
    """A network in float64 whose scores and rates are random, and its state."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(6, 5, bias=False), nn.Tanh(), nn.Linear(5, 3, bias=False)).double()
        scores = Scores.attach(network, keep, "harp")
        state = named_state(network)
        with torch.no_grad():
            for name, tensor in state.items():
                if name.startswith(("score/", "rate/")):
                    tensor.copy_(torch.randn_like(tensor))
        return network, scores, state


def share(k: float, floor: float = FLOOR) -> float:
    return 1 / (1 + math.exp(-k)) * (1 - floor) + floor


def ranked(score: Tensor, count: int) -> Tensor:
    """The mask of the `count` largest |score|, by sorting."""
    order = sorted(range(score.numel()), key=lambda i: -abs(float(score.detach().flatten()[i])))
    return torch.tensor([i in order[:count] for i in range(score.numel())]).view(score.shape)


def masks_of(network: nn.Module) -> list[Tensor]:
    state = effective_state(network)
    return [state[name] != 0 for name in NAMES]


def by_shares(state: dict[str, Tensor]) -> list[Tensor]:
    masks = []
    for name, size in zip(NAMES, SIZES, strict=True):
        kept = size - math.floor((1 - share(float(state[f"rate/{name}"].detach()))) * size)
        masks.append(ranked(state[f"score/{name}"], kept))
    return masks


def penalty_of(scores: Scores) -> BudgetPenalty:
    penalty = scores.follow_shares()
    assert penalty is not None
    scores.refresh()
    return penalty


def test_a_layer_keeps_its_share_of_the_largest_scores() -> None:
    network, scores, state = two_layers()
    penalty_of(scores)
    expected = by_shares(state)
    assert sum(int(mask.sum()) for mask in expected) != 9, "the budget of 45 connections"
    assert all(torch.equal(mask, want) for mask, want in zip(masks_of(network), expected, strict=True))


@pytest.mark.parametrize(
    ("keep", "first"), [("0.01", 0.1), ("0.1", 0.1), ("0.5", 0.5), ("0.001", 0.1), ("1", 0.99 * 0.9 + 0.1)]
)
def test_all_layers_start_at_a_tenth_or_at_the_budget(keep: str, first: float) -> None:
    network = nn.Sequential(nn.Linear(50, 40, bias=False), nn.Linear(40, 7, bias=False))
    scores = Scores.attach(network, Decimal(keep), "harp")
    for name, tensor in named_state(network).items():
        if name.startswith("rate/"):
            assert share(float(tensor.detach()), 0.1 * float(keep)) == pytest.approx(first, rel=1e-6)
    penalty_of(scores)
    assert [abs(entry["kept"] - first * entry["total"]) <= 1 for entry in layer_counts(network)] == [True, True]


def loss_of(effective: Iterable[Tensor]) -> Tensor:
    first, second = effective
    return F.linear(F.linear(X, first).tanh(), second).square().mean()


def test_gradients_are_those_of_the_formulas() -> None:
    """dL/ds = g sign(s) and dL/dr = sum of g, where g = dL/dw_eff w, not normalised. Straight-through replaces the
    ranking's step: w_eff = w (mask + |s| - |s0| + r - r0), whose derivatives are taken by finite differences."""
    network, scores, state = two_layers()
    penalty_of(scores)
    masks, step = [mask.double() for mask in by_shares(state)], 1e-6
    weights = [state[f"weight/{name}"].detach() for name in NAMES]
    loss = F.linear(network(X), torch.eye(3, dtype=torch.float64)).square().mean()
    grads = torch.autograd.grad(loss, [state[f"{kind}/{name}"] for kind in ("score", "rate") for name in NAMES])

    def surrogate(layer: int, change: Tensor | float) -> float:
        parts = [
            w * (mask + (change if i == layer else 0.0)) for i, (w, mask) in enumerate(zip(weights, masks, strict=True))
        ]
        return float(loss_of(parts))

    for layer, name in enumerate(NAMES):
        k, score = float(state[f"rate/{name}"].detach()), state[f"score/{name}"].detach()
        up, down = (share(k + sign * step) - share(k) for sign in (1, -1))
        by_k = (surrogate(layer, up) - surrogate(layer, down)) / (2 * step)
        assert float(grads[2 + layer]) == pytest.approx(by_k, rel=1e-6)
        assert abs(by_k) > 1e-5
        for index in range(score.numel()):
            alone = torch.zeros(score.numel(), dtype=torch.float64)
            alone[index] = step * score.flatten()[index].sign()
            change = alone.view(score.shape)
            by_score = (surrogate(layer, change) - surrogate(layer, -change)) / (2 * step)
            assert float(grads[layer].flatten()[index]) == pytest.approx(by_score, rel=1e-5, abs=1e-9)


def kept_over_budget(rates: list[float]) -> float:
    return sum(share(k) * size for k, size in zip(rates, SIZES, strict=True)) / 9


def test_the_penalty_is_the_hinge_and_its_gradient_that_of_finite_differences() -> None:
    _, scores, state = two_layers()
    penalty, rates, step = penalty_of(scores), [state[f"rate/{name}"] for name in NAMES], 1e-6
    values = [float(rate.detach()) for rate in rates]
    assert kept_over_budget(values) > 1.5
    term = penalty.at(7, steps_per_epoch=5)  # of the second epoch
    assert float(term.detach()) == pytest.approx(0.02 * (kept_over_budget(values) - 1), rel=1e-6)
    for layer, grad in enumerate(torch.autograd.grad(term, rates)):
        up, down = ([k + sign * step * (i == layer) for i, k in enumerate(values)] for sign in (1, -1))
        derivative = 0.02 * (kept_over_budget(up) - kept_over_budget(down)) / (2 * step)
        assert float(grad) == pytest.approx(derivative, rel=1e-5)
    with torch.no_grad():
        for rate in rates:
            rate.fill_(-3.0)
    assert kept_over_budget([-3.0, -3.0]) < 1
    term = penalty.at(8, 5)
    assert float(term.detach()) == 0.0
    assert [float(grad) for grad in torch.autograd.grad(term, rates)] == [0.0, 0.0]


def test_its_weight_grows_with_epochs_until_an_epoch_ends_within_the_budget() -> None:
    def weight(penalty: BudgetPenalty, step: int) -> float:
        excess = float(penalty.excess().detach())
        return float(penalty.at(step, 4).detach()) / excess

    _, scores, state = two_layers()
    rates, penalty = [state[f"rate/{name}"] for name in NAMES], penalty_of(scores)

    def set_rates(value: float) -> None:
        with torch.no_grad():
            for rate in rates:
                rate.fill_(value)

    set_rates(0.0)
    assert [weight(penalty, step) for step in (0, 3, 4, 8)] == pytest.approx([0.01, 0.01, 0.02, 0.03])
    set_rates(-3.0)
    penalty.at(9, 4)  # within an epoch it does not count
    assert penalty.state() == {}
    set_rates(0.0)
    assert weight(penalty, 12) == pytest.approx(0.04)
    set_rates(-3.0)
    penalty.at(16, 4)  # the fourth epoch has ended within the budget
    set_rates(0.0)
    assert [weight(penalty, step) for step in (17, 40)] == pytest.approx([0.04, 0.04])
    assert {name: float(tensor) for name, tensor in penalty.state().items()} == {"penalty/gamma": 0.04}

    resumed = penalty_of(scores)
    resumed.load(penalty.state())
    assert float(resumed.at(40, 4).detach()) == float(penalty.at(40, 4).detach())
    resumed.load({})
    assert weight(resumed, 41) == pytest.approx(0.11)


shapes_of_layers = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=5)
keep_fraction = st.integers(1, 1000).map(lambda thousandths: Decimal(thousandths) / 1000)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), shapes=shapes_of_layers, keep=keep_fraction)
def test_a_finished_network_keeps_the_exact_budget(
    data: st.DataObject, shapes: list[tuple[int, int]], keep: Decimal
) -> None:
    """Whatever the shares: one factor multiplies them all, but no layer keeps more than all or less than one."""
    network = nn.ModuleList([nn.Linear(inputs, outputs, bias=False) for inputs, outputs in shapes])
    scores = Scores.attach(network, keep, "harp")
    sizes = [inputs * outputs for inputs, outputs in shapes]
    budget = max(sum(sizes) - math.floor((1 - Fraction(keep)) * sum(sizes)), len(shapes))
    uniform = [entry["kept"] for entry in layer_counts(network)]
    assert sum(uniform) == budget
    assert all(abs(kept - budget / sum(sizes) * size) <= len(shapes) for kept, size in zip(uniform, sizes, strict=True))
    with torch.no_grad():
        for name, tensor in named_state(network).items():
            if name.startswith("rate/"):
                tensor.fill_(data.draw(st.floats(-40, 40)))
    penalty_of(scores)
    followed = [entry["kept"] for entry in layer_counts(network)]
    assert min(followed) >= 1
    with scores.within_budget():
        counts = [entry["kept"] for entry in layer_counts(network)]
    assert sum(counts) == budget
    assert min(counts) >= 1
    assert [entry["kept"] for entry in layer_counts(network)] == followed
    scores.keep_budget()
    scores.refresh()
    assert [entry["kept"] for entry in layer_counts(network)] == counts


def test_masks_that_stay_have_the_uniform_allocation() -> None:
    """Their rates do not learn, so that all shares are equal: magnitude under `sparsity.allocation: harp`."""
    networks = [build_network(Model(arch="small_cnn", num_classes=10), 0) for _ in ALLOCATIONS]
    for network, allocation in zip(networks, ALLOCATIONS, strict=True):
        Scores.attach(network, Decimal("0.01"), allocation)
    harp, uniform = (layer_counts(network) for network in networks)
    assert all(abs(one["kept"] - other["kept"]) <= 1 for one, other in zip(harp, uniform, strict=True))
    state, uniform_state = (effective_state(network) for network in networks)
    for entry in harp:
        both = ((state[entry["name"]] != 0) & (uniform_state[entry["name"]] != 0)).sum()
        assert entry["kept"] - 1 <= int(both), "the largest weights of each layer"


def test_shares_are_scaled_by_one_factor() -> None:
    network, scores, state = two_layers(Decimal("0.4"))  # 18 of 45
    with torch.no_grad():
        state["rate/0.weight"].fill_(math.log(0.76 / 0.2))  # shares 0.8 and 0.4: 24 and 6 of 30 and 15
        state["rate/2.weight"].fill_(math.log(0.36 / 0.6))
    penalty_of(scores)
    assert [entry["kept"] for entry in layer_counts(network)] in ([24, 6], [25, 6], [24, 7], [25, 7])
    with scores.within_budget():
        assert [entry["kept"] for entry in layer_counts(network)] == [14, 4]  # 14.4 and 3.6


def test_rates_train_with_the_scores_are_averaged_and_restored() -> None:
    network, scores, state = two_layers()
    penalty_of(scores)
    train_only(network, "scores")
    assert state["rate/0.weight"].requires_grad
    ema, own = Ema(network, 0.9, scores), {name: tensor.detach().clone() for name, tensor in state.items()}
    with torch.no_grad():
        state["rate/0.weight"] += 3.0
    scores.refresh()
    moved = scores.mask_sha256()
    ema.update(1)
    load_state(network, own, scores)
    assert scores.mask_sha256() != moved
    with ema.applied():
        assert scores.mask_sha256() == moved
    again, again_state = (
        nn.Sequential(nn.Linear(6, 5, bias=False), nn.Tanh(), nn.Linear(5, 3, bias=False)).double(),
        own,
    )
    again_scores = Scores.attach(again, KEEP, "harp", zero)
    load_state(again, again_state, again_scores)  # the next stage begins, with the exact budget
    assert sum(entry["kept"] for entry in layer_counts(again)) == 9


def test_a_rate_that_is_nan_is_named() -> None:
    _, scores, state = two_layers()
    with torch.no_grad():
        state["rate/2.weight"].fill_(math.nan)
    with pytest.raises(ValueError, match=r"^2\.weight: the layer's rate is NaN; lower the learning rate"):
        scores.refresh()


def test_other_allocations_have_no_penalty() -> None:
    network = nn.Linear(5, 4)
    assert Scores.attach(network, KEEP, "learned").follow_shares() is None
