"""Scores on networks: where they attach, their gradients, and how masks are computed from them."""

from __future__ import annotations

import itertools
import math
import pickle
from decimal import Decimal
from typing import Literal, get_args

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from pipeline.distributed import Group
from pipeline.models import Network, build_network
from pipeline.models.pruning.scores import Scores, maskable
from pipeline.models.pruning.topk import kept_count, topk_mask
from pipeline.models.state import effective_state, layer_counts, named_state, train_only, trained_parameters
from pipeline.recipe.methods import Allocation
from pipeline.recipe.sections import Model
from pipeline.robustness.attacks import LinfBall
from pipeline.robustness.objectives import ObjectiveInput
from pipeline.robustness.objectives.adversarial import adversarial_training
from pipeline.training.batchnorm import BatchStatistics

TENTH = Decimal("0.1")


def small_network(seed: int = 0) -> Network:
    return build_network(Model(arch="small_cnn", num_classes=10), seed)


def weights_of(network: nn.Module) -> dict[str, Tensor]:
    """The effective weights, as a forward uses them."""
    weights = {name: layer.weight for name, layer in maskable(network).items()}
    return {name: weight for name, weight in weights.items() if isinstance(weight, Tensor)}


def to_channels_last(network: nn.Module) -> None:
    network.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]


# --- initial scores --------------------------------------------------------------------------------------------------


def test_attached_scores_keep_the_largest_weights() -> None:
    network = small_network()
    weights = {name: weight.detach().clone() for name, weight in weights_of(network).items()}
    Scores.attach(network, TENTH)
    for name, weight in weights_of(network).items():
        kept = weight.detach() != 0
        assert int(kept.sum()) == kept_count(kept.numel(), TENTH)
        assert weights[name][kept].abs().min() >= weights[name][~kept].abs().max(), name
        assert torch.equal(weight.detach()[kept], weights[name][kept])


def test_an_all_zero_weight_is_named() -> None:
    network = small_network()
    with torch.no_grad():
        named_state(network)["weight/conv2.weight"].zero_()
    with pytest.raises(ValueError, match=r"conv2\.weight: the largest \|weight\| is zero"):
        Scores.attach(network, TENTH)


def test_scores_attach_once_and_only_where_there_is_something_to_prune() -> None:
    network = small_network()
    Scores.attach(network, TENTH)
    with pytest.raises(ValueError, match="already has scores"):
        Scores.attach(network, TENTH)
    with pytest.raises(ValueError, match="nothing to prune"):
        Scores.attach(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()), TENTH)


@pytest.mark.parametrize("allocation", get_args(Allocation))
def test_scores_leave_nothing_on_the_network_that_cannot_be_pickled(allocation: Allocation) -> None:
    """torch refuses to pickle a parametrized layer, so the scores are removed first."""
    network = small_network()
    before = set(vars(network.backbone))
    Scores.attach(network, TENTH, allocation)
    assert set(vars(network.backbone)) == before
    expected = effective_state(network)
    for layer in maskable(network).values():
        parametrize.remove_parametrizations(layer, "weight")
    unpickled = pickle.loads(pickle.dumps(network)).backbone.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in unpickled.items())


# --- any nn.Module ---------------------------------------------------------------------------------------------------


class Twice(nn.Module):
    """One nested layer registered under two names."""

    def __init__(self) -> None:
        super().__init__()
        shared = nn.Linear(4, 4)
        self.first = nn.Sequential(shared, nn.ReLU())
        self.nested = nn.ModuleDict({"again": shared, "out": nn.Linear(4, 2)})

    def forward(self, x: Tensor) -> Tensor:
        return self.nested["out"](self.nested["again"](self.first(x)))


def test_maskable_finds_every_conv_and_linear_of_a_resnet() -> None:
    with torch.device("meta"):  # names only
        plain = torchvision.models.resnet50(num_classes=10)
        network = build_network(Model(arch="resnet50", num_classes=10), 0)
    expected = [f"{n}.weight" for n, m in plain.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert list(maskable(network)) == expected
    assert len(expected) == 54


def test_a_shared_layer_has_one_score_and_its_plain_state_both_names() -> None:
    network, plain = Twice(), Twice()
    Scores.attach(network, Decimal("0.5"))
    assert list(maskable(network)) == ["first.0.weight", "nested.out.weight"]
    assert [n for n in named_state(network) if n.startswith("score/")] == [
        "score/first.0.weight",
        "score/nested.out.weight",
    ]
    plain.load_state_dict(effective_state(network), strict=True)
    x = torch.rand(3, 4)
    torch.testing.assert_close(plain(x), network(x))


def test_a_single_layer_is_a_network() -> None:
    layer = nn.Linear(10, 10)
    Scores.attach(layer, TENTH)
    assert set(named_state(layer)) == {"weight/weight", "weight/bias", "score/weight"}
    assert int((layer.weight != 0).sum()) == 10


def test_tied_weights_are_refused() -> None:
    network = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    network[1].weight = network[0].weight
    with pytest.raises(ValueError, match=r"0\.weight and 1\.weight share one tensor"):
        Scores.attach(network, TENTH)


# --- gradients -------------------------------------------------------------------------------------------------------


def linear_in_float64() -> tuple[nn.Linear, Scores, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    layer = nn.Linear(6, 4).double()
    weight = layer.weight
    scores = Scores.attach(layer, Decimal("0.5"))
    score = named_state(layer)["score/weight"]
    with torch.no_grad():
        score.copy_(torch.randn_like(score))  # scores whose signs differ from the weights'
    scores.refresh()
    return layer, scores, weight, score, torch.randn(5, 6, dtype=torch.float64)


def test_gradients_are_the_closed_formulas() -> None:
    layer, _, weight, score, x = linear_in_float64()
    mask = topk_mask(score, 12)
    target = torch.randn(5, 4, dtype=torch.float64)
    loss = (layer(x) - target).square().sum()
    grad_weight, grad_score = torch.autograd.grad(loss, [weight, score])
    # d loss / d w_eff of a linear layer under squared error, derived analytically.
    effective = weight.detach() * mask
    grad_effective = 2 * (F.linear(x, effective, layer.bias.detach()) - target).T @ x
    torch.testing.assert_close(grad_weight, grad_effective * mask)
    torch.testing.assert_close(grad_score, grad_effective * weight.detach() * score.detach().sign())
    assert bool((grad_score[~mask] != 0).all()), "pruned connections must receive a gradient too"


def test_score_gradient_is_that_of_the_surrogate_by_finite_differences() -> None:
    # Straight-through replaces the step by |s| shifted by a constant: w_eff(s) = w * (mask + |s| - |s0|).
    layer, _, weight, score, x = linear_in_float64()
    mask, start = topk_mask(score, 12).double(), score.detach().clone()

    def surrogate(s: Tensor) -> Tensor:
        return F.linear(x, weight.detach() * (mask + s.abs() - start.abs()), layer.bias.detach()).tanh().sum()

    (grad_score,) = torch.autograd.grad(layer(x).tanh().sum(), score)
    h = 1e-6
    for index in itertools.product(range(4), range(6)):
        ahead, behind = start.clone(), start.clone()
        ahead[index] += h
        behind[index] -= h
        difference = (surrogate(ahead) - surrogate(behind)) / (2 * h)
        assert float(grad_score[index]) == pytest.approx(float(difference), rel=1e-6, abs=1e-9)


def test_weight_gradient_by_finite_differences() -> None:
    layer, scores, weight, _, x = linear_in_float64()

    def loss_at(values: Tensor) -> Tensor:
        scores.weights_changed()  # gradcheck changes them without incrementing their version counter
        return torch.func.functional_call(layer, {"parametrizations.weight.original": values}, (x,)).tanh().sum()

    assert torch.autograd.gradcheck(loss_at, [weight.detach().clone().requires_grad_()])


@pytest.mark.parametrize("what", ["weights", "scores"])
def test_only_what_trains_receives_a_gradient(what: Literal["weights", "scores"]) -> None:
    network = small_network()
    Scores.attach(network, TENTH)
    train_only(network, what)
    network(torch.rand(4, 3, 28, 28)).square().sum().backward()
    state = named_state(network)
    with_grad = {name for name, tensor in state.items() if tensor.grad is not None}
    weights = {f"weight/{name}" for name in maskable(network)} | {"weight/fc2.bias"}
    scores = {f"score/{name}" for name in maskable(network)}
    affine = {f"weight/bn{i}.{kind}" for i in range(1, 4) for kind in ("weight", "bias")}
    assert with_grad == (weights | affine if what == "weights" else scores | affine)
    assert set(trained_parameters(network)) == with_grad


def test_training_scores_needs_scores() -> None:
    with pytest.raises(ValueError, match="no scores"):
        train_only(small_network(), "scores")


# --- masks over time -------------------------------------------------------------------------------------------------


def test_masks_follow_scores_only_when_refreshed() -> None:
    network = small_network()
    scores = Scores.attach(network, TENTH)
    before = scores.mask_sha256()
    with torch.no_grad():
        for name, tensor in named_state(network).items():
            if name.startswith("score/"):
                tensor.copy_(torch.randn_like(tensor))
    network(torch.rand(2, 3, 28, 28))
    assert scores.mask_sha256() == before
    scores.refresh()
    assert scores.mask_sha256() != before
    for name, weight in weights_of(network).items():
        score = named_state(network)[f"score/{name}"].detach()
        assert torch.equal(weight.detach() != 0, topk_mask(score, kept_count(score.numel(), TENTH)))


def test_nan_scores_are_named() -> None:
    network = small_network()
    scores = Scores.attach(network, TENTH)
    with torch.no_grad():
        named_state(network)["score/fc2.weight"][0, 0] = math.nan
    with pytest.raises(ValueError, match=r"fc2\.weight: scores contain NaN"):
        scores.refresh()


def test_mask_hash_and_counts_ignore_the_memory_format() -> None:
    network = small_network()
    assert all(count["kept"] == count["total"] for count in layer_counts(network))
    scores = Scores.attach(network, Decimal("0.01"))
    row_major, counts = scores.mask_sha256(), layer_counts(network)
    to_channels_last(network)
    assert named_state(network)["score/conv2.weight"].stride(1) == 1
    scores.refresh()
    assert scores.mask_sha256() == row_major
    assert layer_counts(network) == counts
    assert counts[0] == {"name": "conv1.weight", "kept": 9, "total": 864}


# --- BatchNorm in the prune phase ------------------------------------------------------------------------------------


def norms_of(network: nn.Module) -> list[nn.BatchNorm2d | nn.BatchNorm1d]:
    return [m for m in network.modules() if isinstance(m, nn.BatchNorm2d | nn.BatchNorm1d)]


def test_a_frozen_batchnorm_keeps_the_dense_networks_values_through_a_step() -> None:
    network = small_network()
    network(torch.rand(16, 3, 28, 28) ** 2)  # statistics that are not the initial ones
    Scores.attach(network, TENTH)
    train_only(network, "scores", "frozen")
    assert set(trained_parameters(network)) == {f"score/{name}" for name in maskable(network)}
    before = {name: tensor.clone() for name, tensor in named_state(network).items()}
    images, labels = torch.rand(6, 3, 28, 28), torch.arange(6)
    statistics = BatchStatistics(network, Group(0, 1, torch.device("cpu")))
    keys = torch.arange(6)
    outcome = adversarial_training(LinfBall(0.1), 1, 0.1)(ObjectiveInput(network, network, images, labels, keys))
    outcome.loss.backward()
    statistics.fold_in(torch.zeros(1, dtype=torch.float64))
    alone = torch.cat([network(image[None]) for image in images])
    torch.testing.assert_close(network(images), alone, msg="an image was normalised by those beside it")
    assert network.training
    statistics.close()
    for name, tensor in named_state(network).items():
        assert torch.equal(tensor, before[name]), name
        assert (tensor.grad is not None) == name.startswith("score/")


def test_only_the_prune_phase_may_freeze_batchnorm() -> None:
    network = small_network()
    Scores.attach(network, TENTH)
    for what in ("weights", "scores"):
        train_only(network, what, "trained" if what == "scores" else "frozen")
        assert all(norm.training and norm.weight.requires_grad for norm in norms_of(network))
    train_only(network, "scores", "frozen")
    assert not any(norm.training or norm.weight.requires_grad for norm in norms_of(network))
