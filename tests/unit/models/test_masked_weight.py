"""The masked copy of a weight: computed once per step and never stale."""

from __future__ import annotations

from decimal import Decimal

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.models import Network, build_network
from pipeline.models.pruning import masked_weight
from pipeline.models.pruning.scores import Scores, maskable
from pipeline.models.state import load_state, named_state, train_only, trained_parameters
from pipeline.recipe.sections import Model
from pipeline.robustness.attacks import crafting

KEEP = Decimal("0.3")


@pytest.fixture
def network() -> Network:
    return build_network(Model(arch="small_cnn", num_classes=10), 0)


@pytest.fixture
def scores(network: Network) -> Scores:
    """Trainable scores on `network`, whose weights are frozen."""
    scores = Scores.attach(network, KEEP)
    train_only(network, "scores")
    return scores


def layers(network: nn.Module) -> dict[str, Tensor]:
    """The weights that a forward uses."""
    return {name: layer.weight for name, layer in maskable(network).items()}  # pyright: ignore[reportReturnType]


def products(network: nn.Module, scores: Scores) -> dict[str, Tensor]:
    """The expected weights."""
    state, masks = named_state(network), scores.masks()
    return {name: state[f"weight/{name}"] * masks[name] for name in masks}


def assert_current(network: nn.Module, scores: Scores, dtype: torch.dtype = torch.float32) -> None:
    expected = products(network, scores)
    assert expected
    for name, weight in layers(network).items():
        assert weight.dtype == dtype
        assert torch.equal(weight, expected[name].to(dtype)), name


def test_memory_is_reused_and_backward_through_an_older_graph_fails(network: Network, scores: Scores) -> None:
    def loss() -> Tensor:
        return network(torch.rand(2, 3, 28, 28, generator=torch.Generator().manual_seed(0))).square().sum()

    before, old = {name: weight.data_ptr() for name, weight in layers(network).items()}, loss()
    scores.weights_changed()
    new = loss()
    assert {name: weight.data_ptr() for name, weight in layers(network).items()} == before
    with pytest.raises(RuntimeError, match=r"modified.* inplace"):
        old.backward()
    new.backward()


def test_the_copy_is_never_stale(network: Network, scores: Scores) -> None:
    assert_current(network, scores)
    with torch.no_grad():
        for name, parameter in trained_parameters(network).items():
            if name.startswith("score/"):
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    scores.refresh()
    assert_current(network, scores)
    with torch.no_grad():
        for name, tensor in named_state(network).items():
            if name.startswith("weight/") and tensor.dim() > 1:
                tensor.mul_(2)
    assert_current(network, scores)
    other = build_network(Model(arch="small_cnn", num_classes=10), 1)
    Scores.attach(other, KEEP)
    load_state(network, named_state(other), scores)
    assert_current(network, scores)
    with torch.autocast("cpu", torch.bfloat16):
        assert_current(network, scores, torch.bfloat16)
    assert_current(network, scores)


@pytest.mark.usefixtures("scores")
def test_the_copy_is_computed_once_for_all_forwards_of_a_step(network: Network) -> None:
    first, second = ({name: w.data_ptr() for name, w in layers(network).items()} for _ in range(2))
    assert first == second
    with torch.autocast("cpu", torch.bfloat16):
        half = {name: w.data_ptr() for name, w in layers(network).items()}
        with crafting(network, lambda: torch.autocast("cpu", torch.bfloat16)):
            assert {name: w.data_ptr() for name, w in layers(network).items()} == half
            assert {w.dtype for w in layers(network).values()} == {torch.bfloat16}


def test_weights_that_train_are_multiplied_once_per_step(network: Network, scores: Scores) -> None:
    """Fused SGD, for example, does not increment the version counter of the weights."""
    train_only(network, "weights")
    first, second = layers(network), layers(network)
    assert all(first[name].data_ptr() == second[name].data_ptr() for name in first)
    optimizer = torch.optim.SGD(trained_parameters(network).values(), lr=1.0, fused=True)
    network(torch.rand(4, 3, 28, 28)).sum().backward()
    optimizer.step()
    scores.weights_changed()
    assert_current(network, scores)


def test_half_precision_gives_the_gradients_of_a_cast_by_autocast(network: Network, scores: Scores) -> None:
    """The reference: autocast casts weight * mask, and its gradient is cast back before it reaches the scores."""
    x, y = torch.rand(4, 3, 28, 28), torch.arange(4)
    with torch.autocast("cpu", torch.bfloat16):
        loss = F.cross_entropy(network(x).float(), y)
    loss.backward()
    grads = {name: score.grad for name, score in trained_parameters(network).items()}

    plain = build_network(Model(arch="small_cnn", num_classes=10), 0)
    state, masks = named_state(network), scores.masks()
    weights = layers(plain)
    with torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(state[f"weight/{name}"] * masks[name])
    with torch.autocast("cpu", torch.bfloat16):
        loss = F.cross_entropy(plain(x).float(), y)
    loss.backward()
    for name, weight in weights.items():
        assert weight.grad is not None
        score = state[f"score/{name}"]
        expected = weight.grad * state[f"weight/{name}"] * score.sign()
        grad = grads[f"score/{name}"]
        assert grad is not None
        assert grad.dtype == torch.float32
        assert torch.equal(grad, expected), name


def test_products_with_channels_last_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where the weight's own layout is kept for its gradient."""
    monkeypatch.setattr(masked_weight, "CHANNELS_LAST_ON", ("cpu",))
    layer = torch.nn.Conv2d(3, 4, 3)
    Scores.attach(layer, Decimal("0.5"))
    original, masked = layer.parametrizations["weight"].original, masked_weight.parametrization_of(layer)  # pyright: ignore
    assert masked is not None
    for _ in range(2):
        images = torch.rand(2, 3, 8, 8).to(memory_format=torch.channels_last)
        product = layer.weight
        assert product.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(product, original * masked.mask)
        layer(images).square().sum().backward()
        plain, other = original.detach().clone().requires_grad_(), images.contiguous()
        torch.nn.functional.conv2d(other, plain * masked.mask, layer.bias).square().sum().backward()
        torch.testing.assert_close(original.grad, plain.grad)
        assert original.grad is not None
        assert original.grad.stride() == original.stride()
        original.grad = masked.score.grad = None
