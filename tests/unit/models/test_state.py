"""The state of networks with and without scores under plain names, and the weights that an attack caches."""

from __future__ import annotations

import contextlib
from decimal import Decimal

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn.utils import parametrize

from pipeline.models import Network, build_network
from pipeline.models.pruning.masked_weight import cached_weights
from pipeline.models.pruning.scores import Scores, maskable
from pipeline.models.state import effective_state, layer_counts, load_state, named_state, train_only
from pipeline.recipe.sections import Model

TENTH = Decimal("0.1")


def small_network(seed: int = 0) -> Network:
    return build_network(Model(arch="small_cnn", num_classes=10), seed)


def weights_of(network: nn.Module) -> dict[str, Tensor]:
    """The effective weights, as a forward uses them."""
    weights = {name: layer.weight for name, layer in maskable(network).items()}
    return {name: weight for name, weight in weights.items() if isinstance(weight, Tensor)}


def to_channels_last(network: nn.Module) -> None:
    network.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]


# --- state -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scored", [False, True])
def test_state_round_trip(scored: bool) -> None:
    source, target = small_network(1), small_network(2)
    source_scores = target_scores = None
    if scored:
        source_scores, target_scores = Scores.attach(source, TENTH), Scores.attach(target, TENTH)
        with torch.no_grad():
            named_state(source)["score/fc1.weight"].copy_(torch.randn(256, 3136))
        source_scores.refresh()
    source(torch.rand(8, 3, 28, 28))  # updates the running statistics
    saved = {name: tensor.detach().clone() for name, tensor in named_state(source).items()}
    live = named_state(target)
    load_state(target, saved, target_scores)
    assert all(torch.equal(live[name], saved[name]) for name in saved)
    if source_scores is not None and target_scores is not None:
        assert target_scores.mask_sha256() == source_scores.mask_sha256()
    images = torch.rand(4, 3, 28, 28)
    assert torch.equal(target.eval()(images), source.eval()(images))


def test_state_names_are_plain_with_and_without_scores() -> None:
    network = small_network()
    kinds = {"running_mean": "buffer", "running_var": "buffer", "num_batches_tracked": "buffer"}
    plain = [f"{kinds.get(n.rsplit('.', 1)[1], 'weight')}/{n}" for n in network.backbone.state_dict()]
    assert list(named_state(network)) == plain
    Scores.attach(network, TENTH)
    scores = {f"score/{name}" for name in maskable(network)}
    assert set(named_state(network)) == set(plain) | scores
    assert len(scores) == 4


def test_load_state_is_strict_and_leaves_the_network_alone() -> None:
    network = small_network()
    good = {name: torch.zeros_like(tensor) for name, tensor in named_state(network).items()}
    before = effective_state(network)
    missing = {name: tensor for name, tensor in good.items() if name != "weight/conv1.weight"}
    with pytest.raises(ValueError, match=r"missing \['weight/conv1\.weight'\], unexpected \['score/x'\]"):
        load_state(network, {**missing, "score/x": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"weight/fc2\.bias: the network has \(10,\), the state \(11,\)"):
        load_state(network, {**good, "weight/fc2.bias": torch.zeros(11)})
    after = effective_state(network)
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("scored", [False, True])
def test_effective_state_is_a_plain_torchvision_network(scored: bool) -> None:
    network = build_network(Model(arch="resnet18", num_classes=10, mean=(0, 0, 0), std=(1, 1, 1)), 0)
    if scored:
        Scores.attach(network, Decimal("0.01"))
        to_channels_last(network)
    state = effective_state(network)
    plain = torchvision.models.resnet18(num_classes=10)
    plain.load_state_dict(state, strict=True)
    images = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(plain.eval()(images), network.eval()(images))
    for count in layer_counts(network):
        weight = state[count["name"]]
        assert int((weight != 0).sum()) == count["kept"]
        assert not bool((weight.signbit() & (weight == 0)).any()), "negative zeros"
        assert weight.is_contiguous()


# --- the cache of an attack ------------------------------------------------------------------------------------------


class Counting(nn.Module):
    """Precedes `Masked` in a layer's parametrizations and counts how often the weight is computed."""

    calls = 0

    def forward(self, weight: Tensor) -> Tensor:
        self.calls += 1
        return weight


def test_cached_weights_are_computed_once_without_a_graph() -> None:
    network = small_network()
    Scores.attach(network, TENTH)
    train_only(network, "scores")
    layer = maskable(network)["fc1.weight"]
    counter = Counting()
    parametrize.register_parametrization(layer, "weight", counter)
    counter.calls = 0
    images = torch.rand(2, 3, 28, 28, requires_grad=True)
    network.eval()
    (expected,) = torch.autograd.grad(network(images).square().sum(), images)
    assert counter.calls == 1
    with cached_weights(network):
        for _ in range(3):
            assert not layer.weight.requires_grad
            (grad,) = torch.autograd.grad(network(images).square().sum(), images)
            assert torch.equal(grad, expected)
    assert counter.calls == 2
    assert layer.weight.requires_grad
    assert counter.calls == 3


def test_the_cache_ends_with_the_context_also_after_an_error() -> None:
    network = small_network()
    Scores.attach(network, TENTH)
    with contextlib.suppress(RuntimeError), cached_weights(network):
        raise RuntimeError
    with torch.no_grad():
        named_state(network)["weight/fc2.weight"].fill_(2.0)
    assert set(weights_of(network)["fc2.weight"].detach().unique().tolist()) == {0.0, 2.0}


def test_cached_weights_need_no_scores() -> None:
    network = small_network().eval()
    images = torch.rand(2, 3, 28, 28)
    with cached_weights(network):
        inside = network(images)
    assert torch.equal(inside, network(images))
