"""Masks, scores and their gradients against brute-force statements of the definitions."""

from __future__ import annotations

import contextlib
import itertools
import math
from decimal import Decimal
from typing import Literal

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from pipeline import sparsity
from pipeline.masks import kept_count, scaled_scores, topk_mask
from pipeline.models import Network, build_network
from pipeline.recipe import Model

TENTH = Decimal("0.1")


def small_network(seed: int = 0) -> Network:
    return build_network(Model(arch="small_cnn", num_classes=10), seed)


def weights_of(network: nn.Module) -> dict[str, Tensor]:
    """The effective weights, as a forward uses them."""
    weights = {name: layer.weight for name, layer in sparsity.maskable(network).items()}
    return {name: weight for name, weight in weights.items() if isinstance(weight, Tensor)}


def to_channels_last(network: nn.Module) -> None:
    network.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]


# --- how many, and which ---------------------------------------------------------------------------------------------


@given(st.integers(1, 10**7), st.decimals("0.0001", "1", places=4))
@settings(deadline=None)
def test_kept_count_is_exact(n: int, keep_fraction: Decimal) -> None:
    ten_thousandths = int(keep_fraction * 10_000)
    pruned = ((10_000 - ten_thousandths) * n) // 10_000
    assert kept_count(n, keep_fraction) == n - pruned
    assert 1 <= kept_count(n, keep_fraction) <= n


@pytest.mark.parametrize(
    ("n", "keep_fraction", "kept"),
    [(1000, "0.1", 100), (1000, "0.9", 900), (9408, "0.01", 95), (1, "0.01", 1), (7, "1", 7), (1000, "0.10", 100)],
)
def test_kept_count_examples(n: int, keep_fraction: str, kept: int) -> None:
    assert kept_count(n, Decimal(keep_fraction)) == kept


@pytest.mark.parametrize("keep_fraction", ["0", "-0.1", "1.01"])
def test_kept_count_refuses_what_is_no_fraction(keep_fraction: str) -> None:
    with pytest.raises(ValueError, match=r"must lie in \(0, 1\]"):
        kept_count(10, Decimal(keep_fraction))


def brute_force_mask(score: Tensor, kept: int) -> Tensor:
    """The definition: sort the logical indices by falling |score|, then by rising index, and keep the first."""
    indices = list(itertools.product(*(range(size) for size in score.shape)))
    ranked = sorted(range(len(indices)), key=lambda i: (-abs(score[indices[i]].item()), i))
    mask = torch.zeros(score.shape, dtype=torch.bool)
    for i in ranked[:kept]:
        mask[indices[i]] = True
    return mask


@st.composite
def scores_in_any_layout(draw: st.DrawFn) -> Tensor:
    shape = draw(st.one_of(st.tuples(*[st.integers(1, 4)] * 4), st.tuples(*[st.integers(1, 8)] * 2)))
    # Few distinct values make ties, and -0.0 and 0.0 are one of them.
    values = st.one_of(st.sampled_from([-2.0, -1.0, -0.0, 0.0, 1.0, 2.0]), st.floats(-3, 3, width=32))
    count = math.prod(shape)
    score = torch.tensor(draw(st.lists(values, min_size=count, max_size=count)), dtype=torch.float32).view(shape)
    layout = draw(st.sampled_from(["contiguous", "channels_last", "transposed", "sliced"]))
    if layout == "channels_last" and len(shape) == 4:
        return score.contiguous(memory_format=torch.channels_last)
    if layout == "transposed":
        return score.transpose(0, 1)
    if layout == "sliced":
        return torch.stack([score, score + 1], dim=-1)[..., 0]
    return score


@given(scores_in_any_layout(), st.data())
@settings(deadline=None)
def test_topk_mask_is_the_brute_force_one(score: Tensor, data: st.DataObject) -> None:
    kept = data.draw(st.integers(0, score.numel()))
    mask = topk_mask(score, kept)
    assert mask.dtype == torch.bool
    assert mask.shape == score.shape
    assert torch.equal(mask, brute_force_mask(score, kept))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kept", [1, 1000, 99_999, 100_000])
def test_topk_mask_is_the_same_on_a_gpu(kept: int) -> None:
    score = torch.randn(100, 1000).round(decimals=2)
    assert torch.equal(topk_mask(score.cuda(), kept).cpu(), topk_mask(score, kept))


def test_topk_mask_of_infinities_keeps_them_first() -> None:
    score = torch.tensor([1.0, -math.inf, 2.0, math.inf])
    assert topk_mask(score, 3).tolist() == [False, True, True, True]


@pytest.mark.parametrize("kept", [1, 3])
def test_topk_mask_refuses_nan(kept: int) -> None:
    with pytest.raises(ValueError, match="NaN"):
        topk_mask(torch.tensor([1.0, math.nan, math.inf]), kept)


@pytest.mark.parametrize("kept", [-1, 4])
def test_topk_mask_refuses_an_impossible_count(kept: int) -> None:
    with pytest.raises(ValueError, match=f"cannot keep {kept} of 3"):
        topk_mask(torch.ones(3), kept)


# --- scores at the start ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layer", "fan_in"),
    [(nn.Linear(7, 3), 7), (nn.Conv2d(4, 6, (3, 5)), 60), (nn.Conv2d(4, 6, 3, groups=2), 18)],
)
def test_scaled_scores_are_the_formula(layer: nn.Linear | nn.Conv2d, fan_in: int) -> None:
    weight = layer.weight.detach().numpy().astype(np.float64)
    expected = np.sqrt(6 / fan_in) * weight / np.abs(weight).max()
    np.testing.assert_allclose(scaled_scores(layer.weight).numpy(), expected, rtol=1e-6)


def test_attached_scores_keep_the_largest_weights() -> None:
    network = small_network()
    weights = {name: weight.detach().clone() for name, weight in weights_of(network).items()}
    sparsity.attach_scores(network, TENTH)
    for name, weight in weights_of(network).items():
        kept = weight.detach() != 0
        assert int(kept.sum()) == kept_count(kept.numel(), TENTH)
        assert weights[name][kept].abs().min() >= weights[name][~kept].abs().max(), name
        assert torch.equal(weight.detach()[kept], weights[name][kept])


def test_an_all_zero_weight_is_named() -> None:
    network = small_network()
    with torch.no_grad():
        sparsity.named_state(network)["weight/conv2.weight"].zero_()
    with pytest.raises(ValueError, match=r"conv2\.weight: the largest \|weight\| is zero"):
        sparsity.attach_scores(network, TENTH)


def test_scores_attach_once_and_only_where_there_is_something_to_prune() -> None:
    network = small_network()
    sparsity.attach_scores(network, TENTH)
    with pytest.raises(ValueError, match="scores already"):
        sparsity.attach_scores(network, TENTH)
    with pytest.raises(ValueError, match="nothing to prune"):
        sparsity.attach_scores(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()), TENTH)


# --- any nn.Module ---------------------------------------------------------------------------------------------------


class Twice(nn.Module):
    """One layer used under two names, in a nest."""

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
    assert list(sparsity.maskable(network)) == expected
    assert len(expected) == 54


def test_a_shared_layer_has_one_score_and_its_plain_state_both_names() -> None:
    network, plain = Twice(), Twice()
    sparsity.attach_scores(network, Decimal("0.5"))
    assert list(sparsity.maskable(network)) == ["first.0.weight", "nested.out.weight"]
    assert [n for n in sparsity.named_state(network) if n.startswith("score/")] == [
        "score/first.0.weight",
        "score/nested.out.weight",
    ]
    plain.load_state_dict(sparsity.effective_state(network), strict=True)
    x = torch.rand(3, 4)
    torch.testing.assert_close(plain(x), network(x))


def test_a_layer_alone_is_a_network() -> None:
    layer = nn.Linear(10, 10)
    sparsity.attach_scores(layer, TENTH)
    assert set(sparsity.named_state(layer)) == {"weight/weight", "weight/bias", "score/weight"}
    assert int((layer.weight != 0).sum()) == 10


def test_tied_weights_are_refused() -> None:
    network = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    network[1].weight = network[0].weight
    with pytest.raises(ValueError, match=r"0\.weight and 1\.weight share one tensor"):
        sparsity.attach_scores(network, TENTH)


# --- gradients -------------------------------------------------------------------------------------------------------


def linear_in_float64(keep_fraction: str = "0.5") -> tuple[nn.Linear, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    layer = nn.Linear(6, 4).double()
    weight = layer.weight
    sparsity.attach_scores(layer, Decimal(keep_fraction))
    score = sparsity.named_state(layer)["score/weight"]
    with torch.no_grad():
        score.copy_(torch.randn_like(score))  # scores whose signs differ from the weights'
    sparsity.refresh_masks(layer)
    return layer, weight, score, torch.randn(5, 6, dtype=torch.float64)


def test_gradients_are_the_closed_formulas() -> None:
    layer, weight, score, x = linear_in_float64()
    mask = brute_force_mask(score.detach(), 12)
    target = torch.randn(5, 4, dtype=torch.float64)
    loss = (layer(x) - target).square().sum()
    grad_weight, grad_score = torch.autograd.grad(loss, [weight, score])
    # d loss / d w_eff of a linear layer under squared error, by hand.
    effective = weight.detach() * mask
    grad_effective = 2 * (F.linear(x, effective, layer.bias.detach()) - target).T @ x
    torch.testing.assert_close(grad_weight, grad_effective * mask)
    torch.testing.assert_close(grad_score, grad_effective * weight.detach() * score.detach().sign())
    assert bool((grad_score[~mask] != 0).all()), "pruned connections must receive a gradient too"


def test_score_gradient_is_that_of_the_surrogate_by_finite_differences() -> None:
    # Straight-through replaces the step by |s| moved by a constant: w_eff(s) = w * (mask + |s| - |s0|).
    layer, weight, score, x = linear_in_float64()
    mask, start = brute_force_mask(score.detach(), 12).double(), score.detach().clone()

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
    layer, weight, _, x = linear_in_float64()

    def loss_at(values: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"parametrizations.weight.original": values}, (x,)).tanh().sum()

    assert torch.autograd.gradcheck(loss_at, [weight.detach().clone().requires_grad_()])


@pytest.mark.parametrize("what", ["weights", "scores"])
def test_only_what_trains_receives_a_gradient(what: Literal["weights", "scores"]) -> None:
    network = small_network()
    sparsity.attach_scores(network, TENTH)
    sparsity.train_only(network, what)
    network(torch.rand(4, 3, 28, 28)).square().sum().backward()
    state = sparsity.named_state(network)
    with_grad = {name for name, tensor in state.items() if tensor.grad is not None}
    weights = {f"weight/{name}" for name in sparsity.maskable(network)} | {"weight/fc2.bias"}
    scores = {f"score/{name}" for name in sparsity.maskable(network)}
    affine = {f"weight/bn{i}.{kind}" for i in range(1, 5) for kind in ("weight", "bias")}
    assert with_grad == (weights | affine if what == "weights" else scores | affine)
    assert set(sparsity.trained_parameters(network)) == with_grad


def test_training_scores_needs_scores() -> None:
    with pytest.raises(ValueError, match="no scores"):
        sparsity.train_only(small_network(), "scores")


# --- masks over time -------------------------------------------------------------------------------------------------


def test_masks_follow_scores_only_when_refreshed() -> None:
    network = small_network()
    sparsity.attach_scores(network, TENTH)
    before = sparsity.mask_sha256(network)
    with torch.no_grad():
        for name, tensor in sparsity.named_state(network).items():
            if name.startswith("score/"):
                tensor.copy_(torch.randn_like(tensor))
    network(torch.rand(2, 3, 28, 28))
    assert sparsity.mask_sha256(network) == before
    sparsity.refresh_masks(network)
    assert sparsity.mask_sha256(network) != before
    for name, weight in weights_of(network).items():
        score = sparsity.named_state(network)[f"score/{name}"].detach()
        assert torch.equal(weight.detach() != 0, topk_mask(score, kept_count(score.numel(), TENTH)))


def test_nan_scores_are_named() -> None:
    network = small_network()
    sparsity.attach_scores(network, TENTH)
    with torch.no_grad():
        sparsity.named_state(network)["score/fc2.weight"][0, 0] = math.nan
    with pytest.raises(ValueError, match=r"fc2\.weight: scores contain NaN"):
        sparsity.refresh_masks(network)


def test_mask_hash_and_counts_ignore_the_memory_format() -> None:
    network = small_network()
    assert sparsity.mask_sha256(network) is None
    assert all(count["kept"] == count["total"] for count in sparsity.layer_counts(network))
    sparsity.attach_scores(network, Decimal("0.01"))
    row_major, counts = sparsity.mask_sha256(network), sparsity.layer_counts(network)
    to_channels_last(network)
    assert sparsity.named_state(network)["score/conv2.weight"].stride(1) == 1
    sparsity.refresh_masks(network)
    assert sparsity.mask_sha256(network) == row_major
    assert sparsity.layer_counts(network) == counts
    assert counts[0] == {"name": "conv1.weight", "kept": 8, "total": 768}


# --- state -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scored", [False, True])
def test_state_round_trip(scored: bool) -> None:
    source, target = small_network(1), small_network(2)
    if scored:
        sparsity.attach_scores(source, TENTH)
        sparsity.attach_scores(target, TENTH)
        with torch.no_grad():
            sparsity.named_state(source)["score/fc1.weight"].copy_(torch.randn(512, 1024))
        sparsity.refresh_masks(source)
    source(torch.rand(8, 3, 28, 28))  # moves the running statistics
    saved = {name: tensor.detach().clone() for name, tensor in sparsity.named_state(source).items()}
    live = sparsity.named_state(target)
    sparsity.load_state(target, saved)
    assert all(torch.equal(live[name], saved[name]) for name in saved)
    assert sparsity.mask_sha256(target) == sparsity.mask_sha256(source)
    images = torch.rand(4, 3, 28, 28)
    assert torch.equal(target.eval()(images), source.eval()(images))


def test_state_names_are_plain_with_and_without_scores() -> None:
    network = small_network()
    kinds = {"running_mean": "buffer", "running_var": "buffer", "num_batches_tracked": "buffer"}
    plain = [f"{kinds.get(n.rsplit('.', 1)[1], 'weight')}/{n}" for n in network.backbone.state_dict()]
    assert list(sparsity.named_state(network)) == plain
    sparsity.attach_scores(network, TENTH)
    scores = {f"score/{name}" for name in sparsity.maskable(network)}
    assert set(sparsity.named_state(network)) == set(plain) | scores
    assert len(scores) == 5


def test_load_state_is_strict_and_leaves_the_network_alone() -> None:
    network = small_network()
    good = {name: torch.zeros_like(tensor) for name, tensor in sparsity.named_state(network).items()}
    before = sparsity.effective_state(network)
    missing = {name: tensor for name, tensor in good.items() if name != "weight/conv1.weight"}
    with pytest.raises(ValueError, match=r"missing \['weight/conv1\.weight'\], unexpected \['score/x'\]"):
        sparsity.load_state(network, {**missing, "score/x": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"weight/fc2\.bias: the network has \(10,\), the state \(11,\)"):
        sparsity.load_state(network, {**good, "weight/fc2.bias": torch.zeros(11)})
    after = sparsity.effective_state(network)
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("scored", [False, True])
def test_effective_state_is_a_plain_torchvision_network(scored: bool) -> None:
    network = build_network(Model(arch="resnet18", num_classes=10, mean=(0, 0, 0), std=(1, 1, 1)), 0)
    if scored:
        sparsity.attach_scores(network, Decimal("0.01"))
        to_channels_last(network)
    state = sparsity.effective_state(network)
    plain = torchvision.models.resnet18(num_classes=10)
    plain.load_state_dict(state, strict=True)
    images = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(plain.eval()(images), network.eval()(images))
    for count in sparsity.layer_counts(network):
        weight = state[count["name"]]
        assert int((weight != 0).sum()) == count["kept"]
        assert not bool((weight.signbit() & (weight == 0)).any()), "negative zeros"
        assert weight.is_contiguous()


# --- the cache of an attack ------------------------------------------------------------------------------------------


class Counting(nn.Module):
    """Stands before `Masked` in a layer's parametrizations and counts how often the weight is computed."""

    calls = 0

    def forward(self, weight: Tensor) -> Tensor:
        self.calls += 1
        return weight


def test_cached_weights_are_computed_once_without_a_graph() -> None:
    network = small_network()
    sparsity.attach_scores(network, TENTH)
    sparsity.train_only(network, "scores")
    layer = sparsity.maskable(network)["fc1.weight"]
    counter = Counting()
    parametrize.register_parametrization(layer, "weight", counter)
    counter.calls = 0
    images = torch.rand(2, 3, 28, 28, requires_grad=True)
    network.eval()
    (expected,) = torch.autograd.grad(network(images).square().sum(), images)
    assert counter.calls == 1
    with sparsity.cached_weights(network):
        for _ in range(3):
            assert not layer.weight.requires_grad
            (grad,) = torch.autograd.grad(network(images).square().sum(), images)
            assert torch.equal(grad, expected)
    assert counter.calls == 2
    assert layer.weight.requires_grad
    assert counter.calls == 3


def test_cached_weights_end_with_the_context_also_after_an_error() -> None:
    network = small_network()
    sparsity.attach_scores(network, TENTH)
    with contextlib.suppress(RuntimeError), sparsity.cached_weights(network):
        raise RuntimeError
    with torch.no_grad():
        sparsity.named_state(network)["weight/fc2.weight"].fill_(2.0)
    assert set(weights_of(network)["fc2.weight"].detach().unique().tolist()) == {0.0, 2.0}


def test_cached_weights_need_no_scores() -> None:
    network = small_network().eval()
    images = torch.rand(2, 3, 28, 28)
    with sparsity.cached_weights(network):
        inside = network(images)
    assert torch.equal(inside, network(images))
