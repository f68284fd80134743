"""S2AP: the ascent and the gradient against finite differences; one attack per micro-batch; scores restored."""

from __future__ import annotations

import math
from decimal import Decimal

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.distributed import Group
from pipeline.models.pruning.scores import Scores
from pipeline.models.state import named_state, train_only
from pipeline.recipe.threat_model import ThreatModel
from pipeline.robustness.objectives import ObjectiveInput, build_objective
from pipeline.robustness.objectives.adversarial import clean_training
from pipeline.robustness.objectives.s2ap import GAMMA, ascent, sharpness_aware
from pipeline.training.batchnorm import BatchStatistics
from tests.support.techniques import usual_objective

NAMES = ("1.weight", "3.weight")
STEP = 1e-6


def images(count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Images [n, 3, 4, 4] in float64, labels and keys."""
    x = torch.linspace(0, 50, count * 48, dtype=torch.float64).sin().square().view(count, 3, 4, 4)
    return x, torch.arange(count) % 5, torch.arange(count) + 7


def two_layers() -> tuple[nn.Module, Scores, dict[str, Tensor]]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = nn.Sequential(
            nn.Flatten(), nn.Linear(48, 9, bias=False), nn.Tanh(), nn.Linear(9, 5, bias=False)
        ).double()
        scores = Scores.attach(network, Decimal("0.3"))
        state = named_state(network)
        with torch.no_grad():
            for name in NAMES:
                state[f"score/{name}"].copy_(torch.randn_like(state[f"score/{name}"]))
        scores.refresh()
    train_only(network, "scores")
    return network, scores, state


def top(score: Tensor) -> Tensor:
    """The mask of the largest 30 %, by sorting."""
    kept = score.numel() - math.floor(Decimal("0.7") * score.numel())
    order = score.abs().flatten().argsort(descending=True)[:kept]
    mask = torch.zeros(score.numel(), dtype=torch.float64)
    mask[order] = 1.0
    return mask.view(score.shape)


def score_gradients(weights: list[Tensor], scores: list[Tensor], x: Tensor, y: Tensor) -> list[Tensor]:
    """dL/ds = dL/dw_eff w sign(s) at the masks of `scores`; dL/dw_eff by finite differences for each connection."""

    def loss(effective: list[Tensor]) -> float:
        logits = F.linear(F.linear(x.flatten(1), effective[0]).tanh(), effective[1])
        return float(F.cross_entropy(logits, y))

    effective = [w * top(s) for w, s in zip(weights, scores, strict=True)]
    found = []
    for layer, (weight, score) in enumerate(zip(weights, scores, strict=True)):
        gradient = torch.zeros_like(weight).flatten()
        for index in range(weight.numel()):
            values = []
            for sign in (1, -1):
                moved = [e.clone() for e in effective]
                moved[layer].view(-1)[index] += sign * STEP
                values.append(loss(moved))
            gradient[index] = (values[0] - values[1]) / (2 * STEP)
        found.append(gradient.view(weight.shape) * weight * score.sign())
    return found


@pytest.fixture
def double_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Objectives take losses in float32, which finite differences do not allow."""
    monkeypatch.setattr(Tensor, "float", Tensor.double)


@pytest.mark.usefixtures("double_precision")
@pytest.mark.parametrize("gamma", [GAMMA, 0.5])
def test_the_gradient_is_that_at_the_ascended_scores(monkeypatch: pytest.MonkeyPatch, gamma: float) -> None:
    monkeypatch.setattr("pipeline.robustness.objectives.s2ap.GAMMA", gamma)
    network, scores, state = two_layers()
    x, y, keys = images(6)
    before = {name: tensor.detach().clone() for name, tensor in state.items()}
    masks = {name: mask.clone() for name, mask in scores.masks().items()}
    output = sharpness_aware(clean_training, scores)(ObjectiveInput(network, network, x, y, keys))
    output.loss.backward()
    output.after_backward()

    weights, start = ([before[f"{kind}/{name}"] for name in NAMES] for kind in ("weight", "score"))
    ascended = []
    for score, gradient in zip(start, score_gradients(weights, start, x, y), strict=True):
        length = math.sqrt(sum(float(g) ** 2 for g in gradient.flatten()))
        size = math.sqrt(sum(float(s) ** 2 for s in score.flatten()))
        ascended.append(score + gamma * size * gradient / length)
    changed = sum(int((top(a) != top(s)).sum()) for a, s in zip(ascended, start, strict=True))
    assert changed > 0, "the masks of s + z are others"
    for name, expected in zip(NAMES, score_gradients(weights, ascended, x, y), strict=True):
        actual = state[f"score/{name}"].grad
        assert actual is not None
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-9)
    assert all(torch.equal(tensor, before[name]) for name, tensor in state.items())
    assert all(torch.equal(mask, masks[name]) for name, mask in scores.masks().items())


def test_the_ascent_has_the_scores_length_and_the_gradients_direction() -> None:
    scores = {"a": torch.tensor([3.0, -4.0]), "b": torch.tensor([[1.0, 0.0, 0.0]])}
    found = ascent(scores, {"a": torch.tensor([0.0, 2.0]), "b": torch.tensor([[3.0, 0.0, -4.0]])})
    torch.testing.assert_close(found["a"], torch.tensor([0.0, 5 * GAMMA]))
    torch.testing.assert_close(found["b"], torch.tensor([[0.6 * GAMMA, 0.0, -0.8 * GAMMA]]))


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf])
def test_without_a_finite_gradient_scores_stay(value: float) -> None:
    scores = {"a": torch.ones(2, 3), "b": torch.ones(2)}
    found = ascent(scores, {"a": torch.full((2, 3), value), "b": torch.tensor([1.0, 0.0])})
    assert torch.equal(found["a"], torch.zeros(2, 3))
    torch.testing.assert_close(found["b"], torch.tensor([math.sqrt(2) * GAMMA, 0.0]))


class Counting(nn.Module):
    """Counts the images in backward passes, in training mode (updates) and in eval mode (attacks)."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(48, 5)
        self.passes = {True: 0, False: 0}

    def forward(self, x: Tensor) -> Tensor:
        logits = self.layer(x.flatten(1))
        if logits.requires_grad:
            training = self.training

            def count(gradient: Tensor) -> None:
                self.passes[training] += len(gradient)

            logits.register_hook(count)
        return logits


@pytest.mark.parametrize("name", ["clean", "pgd", "fgsm", "nfgsm", "free", "trades", "noise", "stability", "smoothadv"])
def test_images_are_attacked_once_and_the_update_is_made_twice(name: str) -> None:
    objective = usual_objective(name)
    threat_model = ThreatModel.model_validate({"norm": "l2" if name == "smoothadv" else "linf", "eps": "1/10"})
    plain, network = Counting(), Counting()
    x, y, keys = images(6)
    x = x.float()
    for one in (plain, network):
        scores = Scores.attach(one, Decimal("0.3"))
        train_only(one, "scores")
        train = build_objective(objective, threat_model, "prune")
        if one is network:
            train = sharpness_aware(train, scores)
        output = train(ObjectiveInput(one, one, x, y, keys, noise=torch.zeros_like(x)))
        output.loss.backward()
        output.after_backward()
    assert network.passes[False] == plain.passes[False]
    assert network.passes[True] == 2 * plain.passes[True] == 2 * 6 * objective.update_passes


def test_batchnorm_has_the_statistics_of_the_first_pass() -> None:
    """Those of the network that is kept: with s, and not with s + z."""
    x, y, keys = images(6)
    x = x.float()
    found = []
    for sharp in (False, True):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 5))
        scores = Scores.attach(network, Decimal("0.3"))
        train_only(network.train(), "scores")
        statistics = BatchStatistics(network, Group(0, 1, torch.device("cpu")))
        objective = sharpness_aware(clean_training, scores) if sharp else clean_training
        output = objective(ObjectiveInput(network, network, x, y, keys, unrecorded=statistics.paused))
        output.loss.backward()
        output.after_backward()
        statistics.fold_in(torch.zeros(1, dtype=torch.float64))
        statistics.close()
        found.append({name: tensor for name, tensor in named_state(network).items() if name.startswith("buffer/")})
    assert int(found[0]["buffer/1.num_batches_tracked"]) == 1
    assert float(found[0]["buffer/1.running_mean"].abs().sum()) > 0
    assert all(torch.equal(tensor, found[1][name]) for name, tensor in found[0].items())
