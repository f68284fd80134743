"""The masked copy of a weight: made once per step, and never an old one."""

from __future__ import annotations

from decimal import Decimal

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.models import Network, build_network
from pipeline.models.pruning import scores
from pipeline.recipe.sections import Model
from pipeline.robustness.attacks import crafting

KEEP = Decimal("0.3")


@pytest.fixture
def network() -> Network:
    """Its scores train, its weights are frozen."""
    found = build_network(Model(arch="small_cnn", num_classes=10), 0)
    scores.attach_scores(found, KEEP)
    scores.train_only(found, "scores")
    return found


def layers(network: nn.Module) -> dict[str, Tensor]:
    """What a forward is given now."""
    return {name: layer.weight for name, layer in scores.maskable(network).items()}  # pyright: ignore[reportReturnType]


def products(network: nn.Module) -> dict[str, Tensor]:
    """What it must be."""
    state, masks = scores.named_state(network), scores.masks_of(network)
    return {name: state[f"weight/{name}"] * masks[name] for name in masks}


def assert_current(network: nn.Module, dtype: torch.dtype = torch.float32) -> None:
    right = products(network)
    assert right
    for name, weight in layers(network).items():
        assert weight.dtype == dtype
        assert torch.equal(weight, right[name].to(dtype)), name


def test_it_keeps_its_memory_and_nothing_goes_back_through_an_older_one(network: Network) -> None:
    def loss() -> Tensor:
        return network(torch.rand(2, 3, 28, 28, generator=torch.Generator().manual_seed(0))).square().sum()

    before, old = {name: weight.data_ptr() for name, weight in layers(network).items()}, loss()
    scores.weights_moved(network)
    new = loss()
    assert {name: weight.data_ptr() for name, weight in layers(network).items()} == before
    with pytest.raises(RuntimeError, match=r"modified.* inplace"):
        old.backward()
    new.backward()


def test_it_is_never_an_old_one(network: Network) -> None:
    assert_current(network)
    with torch.no_grad():
        for name, parameter in scores.trained_parameters(network).items():
            if name.startswith("score/"):
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    scores.refresh_masks(network)
    assert_current(network)
    with torch.no_grad():
        for name, tensor in scores.named_state(network).items():
            if name.startswith("weight/") and tensor.dim() > 1:
                tensor.mul_(2)
    assert_current(network)
    other = build_network(Model(arch="small_cnn", num_classes=10), 1)
    scores.attach_scores(other, KEEP)
    scores.load_state(network, scores.named_state(other))
    scores.refresh_masks(network)
    assert_current(network)
    with torch.autocast("cpu", torch.bfloat16):
        assert_current(network, torch.bfloat16)
    assert_current(network)


def test_it_is_made_once_for_all_forwards_of_a_step(network: Network) -> None:
    first, second = ({name: w.data_ptr() for name, w in layers(network).items()} for _ in range(2))
    assert first == second
    with torch.autocast("cpu", torch.bfloat16):
        half = {name: w.data_ptr() for name, w in layers(network).items()}
        with crafting(network, lambda: torch.autocast("cpu", torch.bfloat16)):
            assert {name: w.data_ptr() for name, w in layers(network).items()} == half
            assert {w.dtype for w in layers(network).values()} == {torch.bfloat16}


def test_weights_that_train_are_multiplied_once_per_step(network: Network) -> None:
    """Fused SGD, for one, changes them without torch's count of their versions."""
    scores.train_only(network, "weights")
    held = layers(network), layers(network)
    assert all(held[0][name].data_ptr() == held[1][name].data_ptr() for name in held[0])
    optimizer = torch.optim.SGD(scores.trained_parameters(network).values(), lr=1.0, fused=True)
    network(torch.rand(4, 3, 28, 28)).sum().backward()
    optimizer.step()
    scores.weights_moved(network)
    assert_current(network)


def test_half_precision_gives_the_gradients_of_a_cast_by_autocast(network: Network) -> None:
    """Written out: autocast casts weight * mask, whose gradient is cast back, and passes to the scores."""
    x, y = torch.rand(4, 3, 28, 28), torch.arange(4)
    with torch.autocast("cpu", torch.bfloat16):
        loss = F.cross_entropy(network(x).float(), y)
    loss.backward()
    found = {name: score.grad for name, score in scores.trained_parameters(network).items()}

    plain = build_network(Model(arch="small_cnn", num_classes=10), 0)
    state, masks = scores.named_state(network), scores.masks_of(network)
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
        right = weight.grad * state[f"weight/{name}"] * score.sign()
        ours = found[f"score/{name}"]
        assert ours is not None
        assert ours.dtype == torch.float32
        assert torch.equal(ours, right), name
