"""Objectives: losses against reference formulas, gradients, counts, and the state they leave unchanged."""

from __future__ import annotations

from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Categorical, kl_divergence
from torch.nn import functional as F

from pipeline import rng
from pipeline.models import Network, build_network
from pipeline.models.pruning.scores import Scores
from pipeline.models.state import named_state, train_only, trained_parameters
from pipeline.recipe.objective import TECHNIQUES
from pipeline.recipe.sections import Model
from pipeline.recipe.threat_model import ThreatModel
from pipeline.robustness.attacks import LinfBall
from pipeline.robustness.objectives import Objective, ObjectiveInput, ObjectiveOutput, build_objective
from pipeline.robustness.objectives.trades import kl_divergence as kl_of_log_probabilities
from tests.support.techniques import objective_of, own_values, usual_objective

NAMES = ["clean", "pgd", "fgsm", "nfgsm", "fgsm_pgi", "free", "trades", "noise", "stability", "smoothadv"]
SMOOTHING = NAMES[-3:]
X, Y = torch.rand(8, 3, 28, 28, generator=torch.Generator().manual_seed(0)), torch.arange(8)
KEYS = torch.from_numpy(rng.sample_keys(np.arange(8), 0, "attack").view(np.int64))
NOISE = 0.2 * torch.rand(8, 3, 28, 28, generator=torch.Generator().manual_seed(2)) - 0.1
"""The noise carried over from the previous step, or the perturbations of the previous epoch in units of eps."""


def objective_named(name: str, norm: str = "linf", phase: str = "pretrain", **values: Any) -> Objective:
    norm = "l2" if name in SMOOTHING else norm
    threat_model = ThreatModel.model_validate({"norm": norm, "eps": "1/10"})
    return build_objective(usual_objective(name, **values), None if name == "clean" else threat_model, phase)


def scored_network(seed: int = 0) -> Network:
    network = build_network(Model(arch="small_cnn", num_classes=10), seed)
    Scores.attach(network, Decimal("0.1"))
    train_only(network, "scores")
    return network


class Recorder:
    """The update's forward: records its inputs and outputs."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self.inputs: list[Tensor] = []
        self.logits: list[Tensor] = []

    def __call__(self, images: Tensor) -> Tensor:
        assert self.network.training, "the update runs in train mode"
        self.inputs.append(images)
        self.logits.append(self.network(images))
        return self.logits[-1]


def run(objective: Objective, network: nn.Module, elapsed: float = 0.0) -> tuple[ObjectiveOutput, Recorder]:
    forward = Recorder(network)
    return objective(ObjectiveInput(network, forward, X, Y, KEYS, elapsed=elapsed, noise=NOISE.clone())), forward


def count(logits: Tensor) -> int:
    return sum(int(row.argmax()) == int(label) for row, label in zip(logits.detach(), Y, strict=True))


def cross_entropy_reference(logits: Tensor) -> float:
    probabilities = logits.detach().double().softmax(dim=1)
    return -float(np.mean([float(probabilities[i, label].log()) for i, label in enumerate(Y.tolist())]))


@pytest.mark.parametrize("name", [name for name in NAMES if "label_smoothing" in TECHNIQUES[name].model_fields])
def test_label_smoothing_spreads_the_label_over_all_classes(name: str) -> None:
    """And changes nothing else: the examples are those of the plain loss, but for free, whose attack comes after."""
    alone = own_values(name, {"prior_weight": 0})
    smoothed, forward = run(objective_named(name, label_smoothing=0.2, **alone), scored_network())
    plain, plain_forward = run(objective_named(name, **alone), scored_network())
    assert torch.equal(forward.inputs[0], plain_forward.inputs[0])
    log_p = forward.logits[-1].detach().double().log_softmax(dim=1)
    labels = Y.repeat_interleave(len(log_p) // len(Y))
    target = 0.8 * F.one_hot(labels, 10) + 0.2 / 10
    assert smoothed.loss.item() == pytest.approx(-(target * log_p).sum(dim=1).mean().item(), rel=1e-5)
    assert smoothed.loss.item() != plain.loss.item()


def test_stronger_attacks_keep_label_smoothing() -> None:
    """After catastrophic overfitting."""
    threat_model = ThreatModel.model_validate({"norm": "linf", "eps": "1/10"})
    losses = []
    for smoothing in (0.0, 0.2):
        recipe = usual_objective("fgsm", label_smoothing=smoothing)
        losses.append(run(build_objective(recipe, threat_model, "prune", 1), scored_network())[0].loss.item())
    assert losses[0] != losses[1]


def test_clean_is_cross_entropy_on_the_images() -> None:
    outcome, forward = run(objective_named("clean"), scored_network())
    assert [fed is X for fed in forward.inputs] == [True]
    assert outcome.loss.item() == pytest.approx(cross_entropy_reference(forward.logits[0]), rel=1e-5)
    assert outcome.clean_correct is not None
    assert int(outcome.clean_correct) == count(forward.logits[0])
    assert outcome.clean_correct.dtype == torch.int64
    assert outcome.robust_correct is None


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("name", ["pgd", "fgsm"])
def test_adversarial_training_is_cross_entropy_on_worse_images(name: str, norm: str) -> None:
    network = scored_network()
    outcome, forward = run(objective_named(name, norm), network)
    (x_adv,) = forward.inputs
    assert outcome.loss.item() == pytest.approx(cross_entropy_reference(forward.logits[0]), rel=1e-5)
    assert outcome.robust_correct is not None
    assert int(outcome.robust_correct) == count(forward.logits[0])
    assert outcome.clean_correct is None
    delta = (x_adv - X).flatten(1)
    reach = delta.abs().amax(dim=1) if norm == "linf" else delta.norm(dim=1)
    assert float(reach.max()) <= 0.1 + 1e-6
    network.eval()
    with torch.no_grad():
        assert float(F.cross_entropy(network(x_adv), Y)) > float(F.cross_entropy(network(X), Y))


def linear_network(classes: int) -> tuple[nn.Module, Tensor]:
    """A network without state, and its weights [classes, pixels]."""
    weight = 0.01 * torch.randn(classes, X[0].numel(), generator=torch.Generator().manual_seed(1))
    layer = nn.Linear(X[0].numel(), classes, bias=False)
    layer.weight = nn.Parameter(weight.clone())
    return nn.Sequential(nn.Flatten(), layer), weight


def test_nfgsm_steps_from_noise_and_leaves_the_ball() -> None:
    """On a linear network every gradient is known, so the example has a closed form with two clips."""
    network, weight = linear_network(classes=2)
    labels, forward = Y % 2, Recorder(network)
    outcome = objective_named("nfgsm", noise_magnitude=1.5)(ObjectiveInput(network, forward, X, labels, KEYS))
    noise = torch.from_numpy(rng.uniforms(KEYS.numpy().view(np.uint64), X[0].numel())).view_as(X)
    towards_the_other = (weight[1] - weight[0]).sign().view_as(X[0]) * torch.where(labels == 0, 1, -1).view(-1, 1, 1, 1)
    start = (X + 1.5 * 0.1 * (2 * noise - 1)).clip(0, 1)
    expected = (start + 0.05 * towards_the_other).clip(0, 1)
    torch.testing.assert_close(forward.inputs[0].double(), expected, rtol=0, atol=1e-6)
    reach = (forward.inputs[0] - X).abs()
    assert 0.19 < float(reach.max()) <= 1.5 * 0.1 + 0.05 + 1e-6
    assert outcome.loss.item() == pytest.approx(F.cross_entropy(forward.logits[0], labels).item())


def test_fgsm_pgi_steps_from_remembered_perturbations_and_keeps_the_logits_together() -> None:
    """On a linear network the example has a closed form, and the logits move by W (example - start)."""
    network, weight = linear_network(classes=2)
    labels, forward, noise = Y % 2, Recorder(network), 10 * NOISE
    objective = objective_named("fgsm_pgi", prior_weight=3.0)
    outcome = objective(ObjectiveInput(network, forward, X, labels, KEYS, noise=noise))
    towards_the_other = (weight[1] - weight[0]).sign().view_as(X[0]) * torch.where(labels == 0, 1, -1).view(-1, 1, 1, 1)
    start = (X.double() + 0.1 * 10 * NOISE).clip(0, 1)
    example = torch.clamp(start + 0.05 * towards_the_other, X - 0.1, X + 0.1).clip(0, 1)
    for fed, expected in zip(forward.inputs, (start, example), strict=True):
        torch.testing.assert_close(fed.double(), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(noise.double(), (example - X) / 0.1, rtol=0, atol=1e-5)

    w = weight.double().requires_grad_(True)
    logits = example.flatten(1) @ w.T
    picked = logits.log_softmax(dim=1)[torch.arange(8), labels]
    moved = ((example - start).flatten(1) @ w.T).square().sum() / (8 * 2)
    expected_loss = -picked.mean() + 3.0 * moved
    assert outcome.loss.item() == pytest.approx(expected_loss.item(), rel=1e-5)
    assert moved.item() > 0.01, "the regulariser is seen"
    expected_loss.backward()
    outcome.loss.backward()
    (parameter,) = network.parameters()
    assert w.grad is not None
    assert parameter.grad is not None
    torch.testing.assert_close(parameter.grad.double(), w.grad, rtol=1e-4, atol=1e-5)


def test_at_an_eps_of_zero_fgsm_pgi_remembers_zeros() -> None:
    network, _ = linear_network(classes=10)
    noise, forward = NOISE.clone(), Recorder(network)
    objective_named("fgsm_pgi", eps_warmup=0.5)(ObjectiveInput(network, forward, X, Y, KEYS, elapsed=0.0, noise=noise))
    assert [torch.equal(fed, X) for fed in forward.inputs] == [True, True]
    assert not bool(noise.any())


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_free_training_updates_its_noise_with_the_gradient_of_the_same_backward(norm: str) -> None:
    """On a linear network the gradient is known: (p - onehot(y)) W / n, and none where the sum leaves [0, 1]."""
    network, weight = linear_network(classes=10)
    noise, forward = NOISE.clone(), Recorder(network)
    outcome = objective_named("free", norm)(ObjectiveInput(network, forward, X, Y, KEYS, noise=noise))
    (fed,) = forward.inputs
    assert torch.equal(fed, (X + NOISE).clip(0, 1))
    assert outcome.loss.item() == pytest.approx(cross_entropy_reference(forward.logits[0]), rel=1e-5)
    outcome.loss.backward()
    assert torch.equal(noise, NOISE), "it changes after the backward"
    outcome.after_backward()

    off = (forward.logits[0].detach().double().softmax(dim=1) - F.one_hot(Y, 10)) / len(X)
    inside = (X + NOISE >= 0) & (X + NOISE <= 1)
    grad = (off @ weight.double()).view_as(X) * inside
    assert 0 < int((~inside).sum()) < inside.numel() / 2
    if norm == "linf":
        expected = (NOISE.double() + 0.05 * grad.sign()).clip(-0.1, 0.1)
    else:
        unprojected = NOISE.double() + 0.05 * grad / grad.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        length = unprojected.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        assert float(length.min()) > 0.1
        expected = unprojected * 0.1 / length
    torch.testing.assert_close(noise.double(), expected, rtol=1e-4, atol=1e-6)
    assert all(parameter.grad is not None for parameter in network.parameters()), "the same backward trains"


def test_the_noise_of_free_training_warms_up_with_eps() -> None:
    network, weight = linear_network(classes=2)
    objective, labels = objective_named("free", eps_warmup=0.5), Y % 2
    ascent = (weight[1] - weight[0]).sign().view_as(X[0]) * torch.where(labels == 0, 1, -1).view(-1, 1, 1, 1)
    for elapsed, strength in ((0.0, 0.0), (0.25, 0.5), (0.5, 1.0)):
        noise, forward = torch.full_like(X, 0.02), Recorder(network)
        outcome = objective(ObjectiveInput(network, forward, X * 0.9, labels, KEYS, elapsed=elapsed, noise=noise))
        outcome.loss.backward()
        outcome.after_backward()
        expected = (0.02 + 0.05 * strength * ascent).clip(-0.1 * strength, 0.1 * strength)
        torch.testing.assert_close(noise, expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("name", ["pgd", "fgsm", "nfgsm", "fgsm_pgi", "trades", "smoothadv"])
def test_eps_warms_up_over_its_fraction_of_pretraining(name: str) -> None:
    """The whole attack is scaled: eps and step_size as in a recipe with smaller values."""
    network, _ = linear_network(classes=10)

    def update_input(elapsed: float, phase: str = "pretrain", **values: Any) -> Tensor:
        return run(objective_named(name, phase=phase, **values), network, elapsed)[1].inputs[-1]

    def at_once(eps: Fraction, step_size: Fraction) -> Tensor:
        threat_model = ThreatModel(norm="l2" if name == "smoothadv" else "linf", eps=eps)
        objective = build_objective(usual_objective(name, step_size=step_size), threat_model, "pretrain")
        return run(objective, network)[1].inputs[-1]

    full_strength = at_once(Fraction(1, 10), Fraction(1, 20))
    assert torch.equal(update_input(0.25, eps_warmup=0.5), at_once(Fraction(1, 20), Fraction(1, 40)))
    for elapsed in (0.5, 0.99):
        assert torch.equal(update_input(elapsed, eps_warmup=0.5), full_strength)
    for phase in ("prune", "finetune", "magnitude"):
        assert torch.equal(update_input(0.0, phase, eps_warmup=0.5), full_strength)
    assert torch.equal(update_input(0.0), full_strength)
    if name != "smoothadv":
        torch.testing.assert_close(update_input(0.0, eps_warmup=0.5), X, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["fgsm", "nfgsm", "fgsm_pgi", "free"])
def test_from_level_one_on_one_step_objectives_are_pgd(name: str) -> None:
    """The same examples from the same random starts: 2^level steps that together can cross the ball."""
    network, _ = linear_network(classes=10)
    threat_model = ThreatModel(norm="linf", eps=Fraction(1, 10))

    def update_input(spec: dict[str, Any], level: int, elapsed: float = 0.0) -> Tensor:
        objective = build_objective(objective_of(**spec), threat_model, "pretrain", level)
        return run(objective, network, elapsed)[1].inputs[-1]

    own = {"name": name, "step_size": "1/8"}
    for level, steps, size in ((1, 2, "1/8"), (2, 4, "1/16"), (4, 16, "1/64")):
        expected = update_input({"name": "pgd", "steps": steps, "step_size": size}, 0)
        assert torch.equal(update_input(own, level), expected)
        assert not torch.equal(update_input(own, 0), expected)
    warm = {"eps_warmup": 0.5}
    assert torch.equal(
        update_input({**own, **warm}, 2, 0.25),
        update_input({"name": "pgd", "steps": 4, "step_size": "1/16", **warm}, 0, 0.25),
    )


def test_trades_loss_is_that_of_torch_distributions() -> None:
    outcome, forward = run(objective_named("trades", beta=3.0), scored_network())
    clean, adversarial = forward.logits
    assert forward.inputs[0] is X
    divergence = kl_divergence(Categorical(logits=clean), Categorical(logits=adversarial))
    expected = F.cross_entropy(clean, Y) + 3.0 * divergence.mean()
    assert outcome.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert outcome.clean_correct is not None
    assert outcome.robust_correct is not None
    assert (int(outcome.clean_correct), int(outcome.robust_correct)) == (count(clean), count(adversarial))
    # The gradient flows through both sides.
    expected_grads = torch.autograd.grad(expected, [clean, adversarial], retain_graph=True)
    grads = torch.autograd.grad(outcome.loss, [clean, adversarial])
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, expected_grad, rtol=1e-4, atol=1e-6)
        assert float(grad.abs().max()) > 0


def test_trades_maximises_the_divergence_from_near_the_image() -> None:
    network = scored_network()
    with torch.no_grad():  # an untrained network's predictions barely differ
        named_state(network)["weight/fc2.weight"].mul_(100)
    _, forward = run(objective_named("trades"), network)
    x_adv = forward.inputs[1]
    assert float((x_adv - X).abs().max()) <= 0.1 + 1e-6
    network.eval()
    ball = LinfBall(0.1)
    with torch.no_grad():
        p = Categorical(logits=network(X))
        reached = kl_divergence(p, Categorical(logits=network(x_adv)))
        by_chance = kl_divergence(p, Categorical(logits=network(ball.random_start(X, KEYS))))
    assert bool((reached > 3 * by_chance).all())


def test_kl_divergence_of_confident_networks_is_finite() -> None:
    logits = torch.tensor([[200.0, 0.0], [0.0, 200.0]])
    log_p, log_q = logits.log_softmax(dim=1), logits.flip(1).log_softmax(dim=1)
    assert kl_of_log_probabilities(log_p, log_q).tolist() == pytest.approx([200.0, 200.0])
    assert kl_of_log_probabilities(log_p, log_p).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("name", NAMES)
def test_the_attack_changes_neither_gradients_nor_statistics(name: str) -> None:
    network = scored_network()
    objective = objective_named(name)
    num_batches = named_state(network)["buffer/bn1.num_batches_tracked"]
    outcome, forward = run(objective, network)
    assert all(parameter.grad is None for parameter in network.parameters())
    assert int(num_batches) == len(forward.inputs), "only the update's forwards update BatchNorm's statistics"
    assert network.training
    outcome.loss.backward()
    with_grad = {name for name, tensor in named_state(network).items() if tensor.grad is not None}
    assert with_grad == set(trained_parameters(network))


@pytest.mark.parametrize("name", NAMES)
def test_the_noise_is_a_function_of_the_keys(name: str) -> None:
    def update_input(some_keys: Tensor) -> Tensor:
        network = scored_network()
        forward = Recorder(network)
        objective_named(name)(ObjectiveInput(network, forward, X, Y, some_keys, noise=NOISE.clone()))
        return forward.inputs[-1]

    first = update_input(KEYS)
    assert torch.equal(first, update_input(KEYS))
    assert torch.equal(first, update_input(KEYS + 1)) == (name in ("clean", "fgsm_pgi", "free"))


@pytest.mark.parametrize("name", NAMES)
def test_under_autocast_losses_are_float32_and_near(name: str) -> None:
    def autocast() -> torch.autocast:
        return torch.autocast("cpu", dtype=torch.bfloat16)

    network = scored_network()
    dtypes = []

    def forward(images: Tensor) -> Tensor:
        with autocast():
            logits = network(images)
        dtypes.append(logits.dtype)
        return logits

    outcome = objective_named(name)(ObjectiveInput(network, forward, X, Y, KEYS, autocast, noise=NOISE.clone()))
    assert set(dtypes) == {torch.bfloat16}
    assert outcome.loss.dtype == torch.float32
    outcome.loss.backward()
    with_grad = {name for name, tensor in named_state(network).items() if tensor.grad is not None}
    assert with_grad == set(trained_parameters(network))
    full_precision, _ = run(objective_named(name), scored_network())
    assert outcome.loss.item() == pytest.approx(full_precision.loss.item(), rel=0.1)


@pytest.mark.parametrize("name", ["clean", "pgd"])
def test_a_few_steps_lower_the_loss(name: str) -> None:
    network = build_network(Model(arch="small_cnn", num_classes=10), 0)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        outcome, _ = run(objective_named(name), network)
        outcome.loss.backward()
        optimizer.step()
        losses.append(outcome.loss.item())
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("name", TECHNIQUES)
def test_an_objective_counts_what_its_technique_declares(name: str) -> None:
    outcome, _ = run(objective_named(name), scored_network())
    technique = TECHNIQUES[name]
    counts = outcome.clean_correct is not None, outcome.robust_correct is not None
    assert (technique.counts_clean, technique.counts_robust) == counts
