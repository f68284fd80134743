"""The learned allocation: gradients, initial masks, exact total, and rates as part of the state."""

from __future__ import annotations

import itertools
import math
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
from pipeline.models.pruning import score_init
from pipeline.models.pruning.allocation import learned_masks, total_kept
from pipeline.models.pruning.scores import Scores, maskable
from pipeline.models.pruning.topk import kept_count
from pipeline.models.state import (
    effective_state,
    layer_counts,
    load_state,
    named_state,
    train_only,
    trained_parameters,
)
from pipeline.recipe.sections import Model

HALF = Decimal("0.5")


def two_layers(keep: Decimal = HALF) -> tuple[nn.Module, dict[str, Tensor]]:
    """A network in float64 with rates that differ from their initial values, and its state."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(6, 5, bias=False), nn.Tanh(), nn.Linear(5, 3, bias=False)).double()
        scores = Scores.attach(network, keep, "learned")
        state = named_state(network)
        with torch.no_grad():
            for name, tensor in state.items():
                if name.startswith(("score/", "rate/")):
                    tensor.copy_(torch.randn_like(tensor))  # scores whose signs differ from the weights'
        scores.refresh()
        return network, state


NAMES = ("0.weight", "2.weight")
X = torch.linspace(-1, 1, 24, dtype=torch.float64).view(4, 6).sin()


def by_brute_force(state: dict[str, Tensor], budget: int, counts: tuple[int, int]) -> dict[str, Tensor]:
    """The expected masks: the strongest of every layer, then the strongest overall."""
    entries = []
    for name, count in zip(NAMES, counts, strict=True):
        magnitudes = state[f"score/{name}"].detach().abs().flatten().tolist()
        threshold = sorted(magnitudes, reverse=True)[count - 1]
        factor = math.exp(float(state[f"rate/{name}"].detach())) / threshold
        layer = sorted(((factor * value, i) for i, value in enumerate(magnitudes)), reverse=True)
        entries += [(rank != 0, -value, name, i) for rank, (value, i) in enumerate(layer)]
    kept = {(name, i) for _, _, name, i in sorted(entries)[:budget]}
    masks = {}
    for name in NAMES:
        score = state[f"score/{name}"]
        masks[name] = torch.tensor([(name, i) in kept for i in range(score.numel())]).view(score.shape)
    return masks


def half_of(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return by_brute_force(state, 23, (15, 8))  # n - floor(n / 2) of 45, of 30 and of 15


def test_the_mask_is_the_global_ranking_of_scores_over_thresholds_times_rates() -> None:
    network, state = two_layers()
    expected = half_of(state)
    assert int(expected["2.weight"].sum()) not in (0, 8, 15)
    for name, weight in effective_state(network).items():
        assert torch.equal(weight != 0, expected[name])


def loss_of(effective: list[Tensor]) -> Tensor:
    return F.linear(F.linear(X, effective[0]).tanh(), effective[1]).square().sum()


def test_gradients_are_the_closed_formulas() -> None:
    network, state = two_layers()
    masks = half_of(state)
    weights, scores = ([state[f"{kind}/{name}"].detach() for name in NAMES] for kind in ("weight", "score"))
    effective = [(w * m).requires_grad_() for w, m in zip(weights, masks.values(), strict=True)]
    by_effective = torch.autograd.grad(loss_of(effective), effective)
    tensors = [state[f"{kind}/{name}"] for kind in ("score", "rate") for name in NAMES]
    grads = torch.autograd.grad(network(X).square().sum(), tensors)
    for layer, (grad, weight, score) in enumerate(zip(by_effective, weights, scores, strict=True)):
        torch.testing.assert_close(grads[layer], grad * weight * score.sign())
        terms = grad * weight * score.abs()
        torch.testing.assert_close(grads[2 + layer], (0.1 * terms.sum() / terms.abs().sum()).view(1))
        assert 0.001 < abs(float(grads[2 + layer])) < 0.1


def test_a_rates_gradient_is_that_of_the_surrogate_over_its_largest_value() -> None:
    """Straight-through replaces the ranking's step by z shifted by a constant: w_eff = w (mask + z - z0). The gradient
    is a tenth of the rate's derivative, by finite differences, over its value if all connections agreed in sign."""
    network, state = two_layers()
    masks, step = half_of(state), 1e-6
    importance = {name: state[f"score/{name}"].detach().abs() * 3.7 for name in NAMES}  # any scale: it cancels

    def surrogate(name: str, value: Tensor) -> float:
        change = {one: value - importance[one] if one == name else torch.zeros(()) for one in NAMES}
        return float(loss_of([state[f"weight/{n}"].detach() * (masks[n] + change[n]) for n in NAMES]))

    grads = torch.autograd.grad(network(X).square().sum(), [state[f"rate/{name}"] for name in NAMES])
    for name, grad in zip(NAMES, grads, strict=True):
        z = importance[name]
        derivative = (surrogate(name, z * math.exp(step)) - surrogate(name, z * math.exp(-step))) / (2 * step)
        largest = 0.0
        for index in itertools.product(*(range(size) for size in z.shape)):
            alone = torch.zeros_like(z)
            alone[index] = z[index] * step
            largest += abs(surrogate(name, z + alone) - surrogate(name, z - alone)) / (2 * step)
        assert float(grad) == pytest.approx(0.1 * derivative / largest, rel=1e-5)


def test_a_layer_without_gradient_does_not_move() -> None:
    network, state = two_layers()
    (grad,) = torch.autograd.grad(0.0 * network(X).sum(), [state["rate/0.weight"]])
    assert float(grad) == 0.0


shape = st.tuples(st.integers(1, 9), st.integers(1, 9))
shapes_of_layers = st.lists(shape, min_size=1, max_size=5)
keep_fraction = st.integers(1, 1000).map(lambda thousandths: Decimal(thousandths) / 1000)


def layers_of(shapes: list[tuple[int, int]], seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.ModuleList([nn.Linear(inputs, outputs, bias=False) for inputs, outputs in shapes])


@settings(max_examples=60)
@given(shapes=shapes_of_layers, keep=keep_fraction, seed=st.integers(0, 5))
def test_it_begins_with_the_uniform_allocation_but_for_roundings(
    shapes: list[tuple[int, int]], keep: Decimal, seed: int
) -> None:
    network, plain = layers_of(shapes, seed), layers_of(shapes, seed)
    Scores.attach(network, keep, "learned")
    Scores.attach(plain, keep, "uniform")
    sizes = [inputs * outputs for inputs, outputs in shapes]
    n = sum(sizes)
    budget = max(n - math.floor((1 - Fraction(keep)) * n), len(shapes))
    assert sum(entry["kept"] for entry in layer_counts(network)) == budget
    uniform, learned = effective_state(plain), effective_state(network)
    # What rounding up per layer keeps beyond the budget.
    rounding_excess = sum(kept_count(size, keep) for size in sizes) - budget
    missing = 0
    for name, weight in learned.items():
        assert not bool(((weight != 0) & (uniform[name] == 0)).any()), "what a layer keeps is its strongest"
        missing += int((uniform[name] != 0).sum()) - int((weight != 0).sum())
    assert missing == rounding_excess <= len(shapes)


@settings(max_examples=60)
@given(data=st.data(), shapes=shapes_of_layers, keep=keep_fraction)
def test_for_any_rates_the_total_is_exact_and_no_layer_is_empty(
    data: st.DataObject, shapes: list[tuple[int, int]], keep: Decimal
) -> None:
    network = layers_of(shapes, 0)
    scores = Scores.attach(network, keep, "learned")
    before = scores.mask_sha256()
    state = named_state(network)
    rates = [tensor for name, tensor in state.items() if name.startswith("rate/")]
    common = data.draw(st.floats(-1000, 1000))
    with torch.no_grad():
        for rate in rates:
            rate += common
    scores.refresh()
    assert scores.mask_sha256() == before, "only differences count"
    uniform = [entry["kept"] for entry in layer_counts(network)]
    with torch.no_grad():
        for rate in rates:
            rate += data.draw(st.floats(-100, 100))
    scores.refresh()
    counts = [entry["kept"] for entry in layer_counts(network)]
    assert sum(counts) == sum(uniform) == total_kept({str(i): torch.Size(s) for i, s in enumerate(shapes)}, keep)
    assert min(counts) >= 1
    if len(shapes) == 1:
        assert scores.mask_sha256() == before, "a single layer has no other to share with"


def test_a_rate_that_grows_takes_connections_from_the_others() -> None:
    network = build_network(Model(arch="small_cnn", num_classes=10), 0)
    scores = Scores.attach(network, Decimal("0.01"), "learned")
    before = {entry["name"]: entry["kept"] for entry in layer_counts(network)}
    assert before["conv1.weight"] in (8, 9)
    with torch.no_grad():
        named_state(network)["rate/conv1.weight"] += 1.0
    scores.refresh()
    after = {entry["name"]: entry["kept"] for entry in layer_counts(network)}
    assert after["conv1.weight"] > 100
    assert all(after[name] <= kept for name, kept in before.items() if name != "conv1.weight")
    assert sum(after.values()) == sum(before.values())


@settings(max_examples=40)
@given(shapes=shapes_of_layers, keep=keep_fraction, exponents=st.lists(st.integers(-20, 20), min_size=5, max_size=5))
def test_the_scale_of_a_layers_scores_does_not_matter(
    shapes: list[tuple[int, int]], keep: Decimal, exponents: list[int]
) -> None:
    network = layers_of(shapes, 0)
    scores = Scores.attach(network, keep, "learned")
    state = named_state(network)
    with torch.no_grad():
        for index, name in enumerate(maskable(network)):
            state[f"rate/{name}"] += 0.3 * index
    scores.refresh()
    before = scores.mask_sha256()
    with torch.no_grad():
        for exponent, name in zip(exponents, maskable(network), strict=False):
            state[f"score/{name}"] *= 2.0**exponent  # exact in floating point
    scores.refresh()
    assert scores.mask_sha256() == before


@pytest.mark.parametrize("zeros", [0, 900, 1000])
def test_layers_of_few_nonzero_scores_have_masks_too(zeros: int) -> None:
    scores = {"a": torch.linspace(0.1, 1, 1000).view(10, 100), "b": torch.linspace(1, 5, 50).view(5, 10)}
    scores["a"].view(-1)[:zeros] = 0
    rates = {name: torch.zeros(1) for name in scores}
    masks = learned_masks(scores, rates, {"a": 200, "b": 10}, 210)
    assert sum(int(mask.sum()) for mask in masks.values()) == 210
    assert int(masks["a"].sum()) == {0: 200, 900: 160, 1000: 160}[zeros]


def test_rates_are_state_that_trains_with_the_scores_and_is_averaged() -> None:
    network = build_network(Model(arch="small_cnn", num_classes=10), 0)
    scores = Scores.attach(network, Decimal("0.1"), "learned")
    names = {f"rate/{name}" for name in maskable(network)}
    state = named_state(network)
    assert {name for name in state if name.startswith("rate/")} == names
    assert not [name for name in effective_state(network) if "rate" in name or "score" in name]
    train_only(network, "weights")
    assert not names & trained_parameters(network).keys()
    train_only(network, "scores")
    assert names < trained_parameters(network).keys()

    ema = Ema(network, 0.9, scores)
    assert {f"ema/{name}" for name in names} < ema.state().keys()
    own = {name: tensor.detach().clone() for name, tensor in state.items()}
    own_masks = scores.mask_sha256()
    with torch.no_grad():
        state["rate/conv1.weight"] += 3.0
    scores.refresh()
    new_masks = scores.mask_sha256()
    assert new_masks != own_masks
    ema.update(1)
    load_state(network, own, scores)
    with ema.applied():
        assert scores.mask_sha256() == new_masks, "masks follow the averaged rates"
    assert scores.mask_sha256() == own_masks

    again = build_network(Model(arch="small_cnn", num_classes=10), 1)
    again_scores = Scores.attach(again, Decimal("0.1"), "learned", score_init.zero)
    load_state(again, own, again_scores)
    assert again_scores.mask_sha256() == own_masks
    with pytest.raises(ValueError, match=r"missing \['rate/conv1\.weight'"):
        load_state(again, {name: t for name, t in own.items() if name not in names}, again_scores)
