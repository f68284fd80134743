"""Certified training: losses and schedules against formulas, proofs, and recipe validation."""

from __future__ import annotations

from decimal import Decimal
from itertools import combinations, pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline import rng
from pipeline.evaluation.measures.verified_bounds import verified
from pipeline.models import Network, build_network
from pipeline.models.pruning.scores import Scores
from pipeline.models.state import named_state, train_only, trained_parameters
from pipeline.recipe.schedules import ramp_at, weight_at
from pipeline.recipe.schema import RecipeError, parse_recipe
from pipeline.recipe.sections import Model
from pipeline.recipe.threat_model import ThreatModel
from pipeline.robustness.bounds import batch_statistics_of, interval_bounds, linf_box, symbolic_bounds, trace
from pipeline.robustness.objectives import Objective, ObjectiveInput, ObjectiveOutput, build_objective
from pipeline.robustness.objectives.crown_ibp import worst_case_loss
from tests.support.small_recipe import small_values
from tests.support.techniques import objective_of, own_values

EPS = 0.02
X, Y = torch.rand(8, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(8)
KEYS = torch.from_numpy(rng.sample_keys(np.arange(8), 0, "attack").view(np.int64))
NAMES = ["ibp", "crown_ibp", "mixtrain"]


def objective_named(name: str, phase: str = "pretrain", **options: Any) -> Objective:
    threat_model = ThreatModel.model_validate({"norm": "linf", "eps": EPS})
    return build_objective(objective_of(name, **own_values(name, options)), threat_model, phase)


def scored_network() -> Network:
    network = build_network(Model(arch="small_cnn", num_classes=10), 0)
    Scores.attach(network, Decimal("0.5"))
    train_only(network, "scores")
    return network.train()


def run(objective: Objective, network: nn.Module, elapsed: float = 0.5) -> ObjectiveOutput:
    return objective(ObjectiveInput(network, network, X, Y, KEYS, elapsed=elapsed))


def parts(network: nn.Module, eps: float, symbolic: bool = False) -> dict[str, Tensor]:
    """The terms of the losses, from a separate forward."""
    with batch_statistics_of(network) as statistics:
        clean = network(X)
    graph, box = trace(network), linf_box(X, eps)
    bounds = interval_bounds(graph, box, statistics)
    terms = {"clean": F.cross_entropy(clean, Y), "ibp": bounds.interval_margins(Y), "crown": bounds.linear_margins(Y)}
    if symbolic:
        terms["symbolic"] = symbolic_bounds(graph, box, statistics).linear_margins(Y, parallel=True)
    return terms


def test_the_worst_case_loss_is_the_cross_entropy_of_the_worst_logits() -> None:
    margins = torch.tensor([[0.0, 2.0, -1.0], [0.5, 0.0, 3.0]])
    expected = [np.log(1 + np.exp(-2.0) + np.exp(1.0)), np.log(1 + np.exp(-0.5) + np.exp(-3.0))]
    assert float(worst_case_loss(margins, torch.tensor([0, 1]))) == pytest.approx(np.mean(expected), rel=1e-6)


@pytest.mark.parametrize(
    ("elapsed", "eps", "kappa", "beta"), [(0.0, 0.0, 1.0, 1.0), (0.2, 0.01, 0.8, 0.6), (0.4, 0.02, 0.6, 0.2)]
)
@pytest.mark.parametrize("name", ["ibp", "crown_ibp"])
def test_certified_losses_are_their_formula(name: str, elapsed: float, eps: float, kappa: float, beta: float) -> None:
    schedule: dict[str, Any] = {
        "eps_ramp": 0.4,
        "kappa_start": 1.0,
        "kappa_end": 0.6,
        "crown_start": 1.0,
        "crown_end": 0.2,
    }
    outcome = run(objective_named(name, **schedule), scored_network(), elapsed)
    terms = parts(scored_network(), eps)
    share = beta if name == "crown_ibp" else 0.0
    margins = share * terms["crown"] + (1 - share) * terms["ibp"]
    expected = kappa * terms["clean"] + (1 - kappa) * F.cross_entropy(-margins, Y)
    assert outcome.loss.item() == pytest.approx(expected.item(), rel=1e-4)
    tightest = torch.maximum(terms["crown"], terms["ibp"]) if share else terms["ibp"]
    proofs = sum(
        all(float(row[j]) > 0 for j in range(10) if j != y) for row, y in zip(tightest.detach(), Y, strict=True)
    )
    assert outcome.robust_correct is not None
    assert int(outcome.robust_correct) == proofs
    assert outcome.robust_correct.dtype == torch.int64


def test_proofs_are_counted_at_the_current_eps() -> None:
    network = build_network(Model(arch="small_cnn", num_classes=10), 0)
    scores = Scores.attach(network, Decimal("0.5"))
    train_only(network.train(), "scores")
    optimizer = torch.optim.SGD([p for p in network.parameters() if p.requires_grad], lr=0.05)
    for _ in range(30):
        optimizer.zero_grad()
        F.cross_entropy(network(X), Y).backward()
        optimizer.step()
        scores.refresh()
    counts = [run(objective_named("crown_ibp", eps_ramp=1.0), network, e).robust_correct for e in (0.0, 0.999)]
    assert counts[0] == 8
    assert 0 <= int(counts[1] if counts[1] is not None else -1) < 8


@pytest.mark.parametrize("phase", ["prune", "finetune", "magnitude"])
@pytest.mark.parametrize("name", NAMES)
def test_after_pretrain_schedules_are_at_their_end(name: str, phase: str) -> None:
    late = run(objective_named(name, robust_probability=1.0), scored_network(), 1.0).loss
    early = run(objective_named(name, robust_probability=1.0), scored_network(), 0.0).loss
    here = run(objective_named(name, phase, robust_probability=1.0), scored_network(), 0.0).loss
    assert here.item() == late.item()
    assert here.item() != early.item()


def test_mixtrain_matches_its_formula_on_the_images_drawn_from_the_keys() -> None:
    options: dict[str, Any] = {
        "eps_ramp": 0.25,
        "robust_samples": 3,
        "robust_probability": 1.0,
        "robust_weight_end": 8.0,
    }
    outcome = run(objective_named("mixtrain", **options), scored_network(), 0.8)
    weight = weight_at(0.1, 8.0, 0.25, 0.8)
    clean = parts(scored_network(), EPS, symbolic=True)
    per_image = F.cross_entropy(-clean["symbolic"], Y, reduction="none")
    losses = [
        ((clean["clean"] + weight * per_image[list(c)].mean()) / (1 + weight)).item() for c in combinations(range(8), 3)
    ]
    assert min(abs(outcome.loss.item() - loss) for loss in losses) < 1e-3
    other = ObjectiveInput(network := scored_network(), network, X, Y, KEYS + 1, elapsed=0.8)
    assert objective_named("mixtrain", **options)(other).loss.item() != outcome.loss.item()
    again = run(objective_named("mixtrain", **options), scored_network(), 0.8)
    assert torch.equal(again.loss, outcome.loss)
    assert outcome.robust_correct is None


def test_mixtrain_includes_the_robust_term_with_the_given_probability() -> None:
    """On a network whose clean cross-entropy is exactly log 2, and whose worst case, of weight w, is not."""
    layer = nn.Linear(4, 2, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, -1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]))
    network = nn.Sequential(nn.Flatten(), layer)
    x, y = torch.full((2, 1, 2, 2), 0.5), torch.tensor([0, 1])
    objective = objective_named("mixtrain", robust_probability=0.7, eps_ramp=0.0)
    robust, weight = 0, weight_at(0.1, 50.0, 0.0, 0.9)
    for trial in range(400):
        stream = torch.from_numpy(rng.sample_keys(np.arange(2), trial, "attack").view(np.int64))
        loss = (1 + weight) * objective(ObjectiveInput(network, network, x, y, stream, elapsed=0.9)).loss.item()
        robust += abs(loss - float(np.log(2))) > 1e-3
    assert 0.7 * 400 - 40 < robust < 0.7 * 400 + 40


@pytest.mark.parametrize("name", NAMES)
def test_gradients_reach_exactly_the_trainable_tensors(name: str) -> None:
    network = scored_network()
    outcome = run(objective_named(name, robust_probability=1.0), network, 0.5)
    assert outcome.loss.dtype == torch.float32
    assert all(parameter.grad is None for parameter in network.parameters())
    outcome.loss.backward()
    state = named_state(network)
    grads = {n: tensor.grad for n, tensor in state.items() if tensor.grad is not None}
    assert grads.keys() == trained_parameters(network).keys()
    assert all(bool(torch.isfinite(grad).all()) for grad in grads.values())
    assert int(state["buffer/bn1.num_batches_tracked"]) == 1, "bounds do not update statistics"


@pytest.mark.parametrize("name", NAMES)
def test_the_loss_includes_the_clean_forward_even_with_weight_zero(name: str) -> None:
    """ZeRO sets up gradient reduction in the backward of the update's forward."""
    network, grads = scored_network(), []

    def forward(images: Tensor) -> Tensor:
        logits = network(images)
        logits.register_hook(grads.append)
        return logits

    objective = objective_named(name, kappa_start=0.0, kappa_end=0.0, robust_probability=1.0)
    objective(ObjectiveInput(network, forward, X, Y, KEYS, elapsed=0.9)).loss.backward()
    assert len(grads) == 1


@pytest.mark.parametrize("name", ["ibp", "crown_ibp"])
def test_training_increases_the_number_of_proofs(name: str) -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(128, 10)]
    network = Network(nn.Sequential(*layers), (0.5,) * 3, (0.25,) * 3)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
    objective = objective_named(name, eps_ramp=0.5)
    before = verified(network, X, Y, EPS)
    for step in range(60):
        optimizer.zero_grad()
        run(objective, network, step / 60).loss.backward()
        optimizer.step()
    after = verified(network, X, Y, EPS)
    assert int(before.proved.sum()) <= 1
    assert int(after.proved.sum()) >= 7
    assert network.training


def test_proved_images_are_correct_and_symbolic_intervals_prove_no_fewer() -> None:
    torch.manual_seed(1)
    layers = [nn.Conv2d(3, 6, 3, 2, 1), nn.ReLU(), nn.Conv2d(6, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(24, 10)]
    network = nn.Sequential(*layers)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(network(X), Y).backward()
        optimizer.step()
    labels = Y.clone()
    labels[0] = 5  # not the class that was trained
    proofs = {}
    for eps in (0.0, 0.02, 0.04, 0.06, 0.08, 0.1, 1.0):
        interval, symbolic = verified(network, X, labels, eps), verified(network, X, labels, eps, symbolic=True)
        assert torch.equal(interval.prediction, network(X).argmax(dim=1))
        assert bool((interval.prediction == labels)[interval.proved].all())
        assert bool((symbolic.proved | ~interval.proved).all())
        proofs[eps] = (int(interval.proved.sum()), int(symbolic.proved.sum()))
    assert proofs[0.0] == (7, 7)
    assert proofs[1.0] == (0, 0)
    assert any(interval < symbolic for interval, symbolic in proofs.values()), proofs


SHARE = st.floats(0.0, 1.0)


@given(st.floats(-5, 5), st.floats(-5, 5), SHARE, SHARE)
def test_a_ramp_is_linear_then_flat(start: float, end: float, ramp: float, elapsed: float) -> None:
    expected = np.interp(elapsed, [0.0, ramp], [start, end]) if ramp > 0 else end
    assert ramp_at(start, end, ramp, elapsed) == pytest.approx(float(expected), abs=1e-6)


def test_mixtrains_weight_grows_by_the_same_factor_in_the_same_time() -> None:
    """From 0.1 at a quarter of the phase to 50 with three quarters of the rest done, at 0.8125."""
    assert [weight_at(0.1, 50.0, 0.25, e) for e in (0.0, 0.25, 0.8125, 1.0)] == pytest.approx([0.1, 0.1, 50.0, 50.0])
    values = [weight_at(0.1, 50.0, 0.25, 0.25 + 0.05 * i) for i in range(12)]
    ratios = [later / earlier for earlier, later in pairwise(values)]
    assert ratios[:11] == pytest.approx([ratios[0]] * 11)
    assert ratios[0] == pytest.approx(500.0 ** (0.05 / 0.5625))
    assert weight_at(0.1, 50.0, 1.0, 0.999) == pytest.approx(0.1)
    assert weight_at(0.1, 50.0, 1.0, 1.0) == pytest.approx(50.0)


@pytest.mark.parametrize("name", NAMES)
def test_recipes_of_certified_training(name: str, tmp_path: Any) -> None:
    values = small_values(tmp_path) | {"objective": {"name": name}}
    assert parse_recipe(values, "r").objective == objective_of(name)
    values["threat_model"] = {"norm": "l2", "eps": "1/2"}
    with pytest.raises(
        RecipeError, match=f"objective.name {name} .*threat_model.norm is l2; use threat_model.norm=linf"
    ):
        parse_recipe(values, "r")
