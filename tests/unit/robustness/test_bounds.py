"""Bounds: sound against sampling, attacks and exact minima; equal to reference formulas where there are any."""

from __future__ import annotations

import itertools
from decimal import Decimal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.models import Network, build_network
from pipeline.models.architectures.vgg_cifar import CifarVGG
from pipeline.models.architectures.wide_resnet import WideResNet
from pipeline.models.pruning.scores import Scores, maskable
from pipeline.models.state import effective_state, named_state, train_only
from pipeline.recipe.architectures import OWN
from pipeline.recipe.sections import Model
from pipeline.robustness.attacks import LinfBall, pgd
from pipeline.robustness.bounds import (
    Bounds,
    Box,
    batch_statistics_of,
    interval_bounds,
    linf_box,
    proved,
    symbolic_bounds,
    trace,
)
from pipeline.robustness.bounds.layers import FUNCTIONS, MODULES
from pipeline.robustness.bounds.operations import MaxPool, Operation, Relu

POINTS = 10_000
CLASSES = 4


class Block(nn.Module):
    """A basic residual block; the shortcut is a strided 1x1 convolution."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.relu = nn.ReLU(inplace=True)
        self.short = nn.Sequential(nn.Conv2d(channels, out, 1, stride), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += self.short(x)
        return self.relu(out)


class Residual(nn.Module):
    """Every kind of layer in residual networks, as functions where possible."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, 1, 1)
        self.block1, self.block2 = Block(4, 6, 2), Block(6, 8, 1)
        self.fc = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.stem(x).relu(), 3, 2, 1)
        x = self.block2(self.block1(x)) + 1.0
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


def backbones() -> dict[str, nn.Module]:
    plain = [nn.Conv2d(3, 4, 4, 2, 1), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Flatten()]
    pooled = [nn.Conv2d(3, 6, 3, 1, 1, groups=3), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2)]
    pooled += [nn.Conv2d(6, 4, 3, 1, 1), nn.Dropout(), nn.ReLU(), nn.AvgPool2d(3, 2, 1), nn.Identity(), nn.Flatten()]
    return {
        "plain": nn.Sequential(*plain, nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, CLASSES)),
        "pooled": nn.Sequential(*pooled, nn.Linear(16, CLASSES)),
        "residual": Residual(),
        "wide": WideResNet(10, 2, CLASSES),
        "vgg6_bn": CifarVGG(6, True, CLASSES),
    }


NETWORKS = ["plain", "pooled", "residual", "plain masked", "residual masked", "small_cnn masked"]


def network_named(name: str, seed: int = 0) -> Network:
    """In eval mode, with BatchNorm statistics, shifts and scales that are not the initial ones."""
    kind, _, masked = name.partition(" ")
    torch.manual_seed(seed)
    if kind in ("small_cnn", "resnet18"):
        network = build_network(Model(arch=kind, num_classes=CLASSES), seed)
    else:
        network = Network(backbones()[kind], (0.4, 0.5, 0.6), (0.2, 0.3, 0.25))
    size = 16 if kind.startswith("vgg") else 8
    for module in network.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.uniform_(module.weight, -1.0, 1.5)
            nn.init.normal_(module.bias, 0.0, 0.3)
    with torch.no_grad():
        network.train()(torch.rand(16, 3, size, size))
        for parameter in network.parameters():  # the last layer starts small, so that any bounds would be close
            parameter.mul_(1.5)
    if masked:
        Scores.attach(network, Decimal("0.1"))
    return network.eval()


def image(seed: int = 0, count: int = 1, size: int = 8) -> Tensor:
    """Some pixels are near 0 and 1, so that the box is clipped."""
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed)).mul(1.2).sub(0.1).clamp(0, 1)


def points_in(box: Box, count: int) -> Tensor:
    """Half uniform, half corners: [count, ...] from a box of one image."""
    share = torch.rand(count, *box.lower.shape[1:], generator=torch.Generator().manual_seed(1))
    share[::2] = share[::2].round()
    return torch.minimum(torch.maximum(box.lower + share * (box.upper - box.lower), box.lower), box.upper)


def margins_of(logits: Tensor, y: Tensor) -> Tensor:
    return logits.gather(1, y[:, None]) - logits


@torch.no_grad()
def all_margins(network: nn.Module, x: Tensor, y: Tensor, eps: float) -> dict[str, Tensor]:
    graph, box = trace(network), linf_box(x, eps)
    bounds, symbolic = interval_bounds(graph, box), symbolic_bounds(graph, box)
    return {
        "ibp": bounds.interval_margins(y),
        "crown_ibp": bounds.linear_margins(y),
        "parallel": bounds.linear_margins(y, parallel=True),
        "symbolic ibp": symbolic.interval_margins(y),
        "symbolic": symbolic.linear_margins(y, parallel=True),
        "symbolic adaptive": symbolic.linear_margins(y),
    }


def rounding(values: Tensor) -> float:
    return 2e-5 * (1.0 + float(values.abs().max()))


@pytest.mark.parametrize("name", NETWORKS)
def test_bounds_contain_sampled_points(name: str) -> None:
    network, x, y, eps = network_named(name), image(), torch.tensor([1]), 0.1
    box = linf_box(x, eps)
    with torch.no_grad():
        logits = network(points_in(box, POINTS))
        bounds = interval_bounds(trace(network), box).logits
        slack = rounding(logits)
        assert bool((bounds.lower <= logits + slack).all())
        assert bool((bounds.upper >= logits - slack).all())
        reached = margins_of(logits, y.expand(POINTS)).amin(dim=0)
        assert float(reached.max() - reached.min()) > 100 * slack, "the outputs must vary over the box"
        for kind, margins in all_margins(network, x, y, eps).items():
            assert bool((margins[0] <= reached + slack).all()), kind
            assert margins[0, 1] == 0


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "eps"), [("resnet18", 0.01), ("wide", 0.01), ("vgg6_bn", 0.02), ("vgg6_bn masked", 0.02)]
)
def test_the_shipped_architectures_are_bounded(name: str, eps: float) -> None:
    network, y, size = network_named(name), torch.tensor([1]), 16 if name.startswith("vgg") else 8
    box = linf_box(image(size=size), eps)
    bounds = interval_bounds(trace(network), box)
    logits = network(points_in(box, 200))
    reached = margins_of(logits, y.expand(200)).amin(dim=0)
    assert float(reached.max() - reached.min()) > 100 * rounding(logits), "the outputs must vary over the box"
    for margins in (bounds.interval_margins(y), bounds.linear_margins(y)):
        assert bool((margins[0] <= reached + rounding(logits)).all())
        assert bool(torch.isfinite(margins).all())


@pytest.mark.parametrize("arch", [*OWN, "resnet18", "resnet34", "resnet50"])
def test_every_network_of_the_paper_has_bounds(arch: str) -> None:
    with torch.device("meta"):
        network = build_network(Model(arch=arch, num_classes=10), 0, 32)
    if arch == "ra_resnet50":
        with pytest.raises(ValueError, match=r"stage1-block0\.F\.a\.1 \(SiLU\) cannot be bounded"):
            trace(network)
    else:
        assert len(trace(network).layers) > len(list(maskable(network)))


@pytest.mark.parametrize("name", ["plain", "pooled", "residual masked"])
def test_intermediate_boxes_contain_sampled_points(name: str) -> None:
    """Every intermediate value, by running the operations on points as boxes of zero width."""
    network, box = network_named(name), linf_box(image(), 0.1)
    points = points_in(box, 1000)
    with torch.no_grad():
        exact = interval_bounds(trace(network), Box(points, points))
        torch.testing.assert_close(exact.logits.lower, network(points), rtol=1e-4, atol=1e-4)
        for bounds in (interval_bounds(trace(network), box), symbolic_bounds(trace(network), box)):
            for inner, outer in zip(exact.boxes, bounds.boxes, strict=True):
                slack = rounding(inner.lower)
                assert bool((outer.lower <= inner.upper + slack).all())
                assert bool((outer.upper >= inner.lower - slack).all())


@pytest.mark.parametrize("name", NETWORKS)
def test_no_attack_gets_below_the_margins(name: str) -> None:
    network, x, y, eps = network_named(name, seed=2), image(3, count=3), torch.arange(3), 0.05
    margins = all_margins(network, x, y, eps)
    for wrong in range(CLASSES):

        def loss(logits: Tensor, wrong: int = wrong) -> Tensor:
            return logits[:, wrong] - logits.gather(1, y[:, None])[:, 0]

        x_adv = pgd(network, x, loss, ball=LinfBall(eps), steps=15, step_size=eps / 4, start=x)
        with torch.no_grad():
            attacked = -loss(network(x_adv))
        for kind, bound in margins.items():
            assert bool((bound[:, wrong] <= attacked + rounding(attacked)).all()), kind


@pytest.mark.parametrize("name", [*NETWORKS, "resnet18"])
def test_at_eps_0_bounds_are_the_network(name: str) -> None:
    network, x, y = network_named(name), image(4, count=3), torch.arange(3)
    with torch.no_grad():
        logits = network(x)
        expected = margins_of(logits, y)
        box = interval_bounds(trace(network), linf_box(x, 0.0)).logits
        for bound in (*box, *(y_margin for y_margin in all_margins(network, x, y, 0.0).values())):
            target = logits if bound is box.lower or bound is box.upper else expected
            torch.testing.assert_close(bound, target, rtol=1e-4, atol=rounding(logits))


def test_the_box_is_clipped_to_0_and_1_and_not_to_the_images_own_range() -> None:
    x = torch.tensor([[0.0, 0.25, 0.5, 0.98]])
    box = linf_box(x, 0.1)
    torch.testing.assert_close(box.lower, torch.tensor([[0.0, 0.15, 0.4, 0.88]]))
    torch.testing.assert_close(box.upper, torch.tensor([[0.1, 0.35, 0.6, 1.0]]))


def test_one_linear_layer_is_exact() -> None:
    """margin_j = min (w_y - w_j) x + b_y - b_j: each pixel at the worse end of its box."""
    rng = np.random.default_rng(0)
    layer = nn.Linear(12, CLASSES)
    x = rng.random((5, 12)).astype(np.float32)
    y = torch.tensor([0, 1, 2, 3, 0])
    weight, bias = layer.weight.detach().double().numpy(), layer.bias.detach().double().numpy()
    low, high = np.clip(x - 0.2, 0, 1), np.clip(x + 0.2, 0, 1)
    expected = np.zeros((5, CLASSES))
    for i, j in itertools.product(range(5), range(CLASSES)):
        direction = weight[y[i]] - weight[j]
        worst = np.where(direction > 0, low[i], high[i])
        expected[i, j] = direction @ worst + bias[y[i]] - bias[j]
    for kind, margins in all_margins(nn.Sequential(layer), torch.from_numpy(x), y, 0.2).items():
        np.testing.assert_allclose(margins.detach().numpy(), expected, rtol=1e-4, atol=1e-5, err_msg=kind)


def exact_minimum(layers: list[tuple[np.ndarray, np.ndarray]], low: np.ndarray, high: np.ndarray) -> float:
    """Minimum of a ReLU network with one output: a linear programme for every pattern of its ReLUs."""
    best = np.inf
    widths = [len(bias) for _, bias in layers[:-1]]
    for pattern in itertools.product([0.0, 1.0], repeat=sum(widths)):
        matrix, constant = np.eye(len(low)), np.zeros(len(low))
        rows, limits, at = [], [], 0
        for (weight, bias), width in zip(layers[:-1], widths, strict=True):
            matrix, constant = weight @ matrix, weight @ constant + bias
            on = np.array(pattern[at : at + width])
            sign = 1.0 - 2.0 * on  # a ReLU that is on has a value >= 0: -value <= 0
            rows.append(sign[:, None] * matrix)
            limits.append(-sign * constant)
            matrix, constant, at = on[:, None] * matrix, on * constant, at + width
        weight, bias = layers[-1]
        solved = linprog(
            (weight @ matrix)[0], np.concatenate(rows), np.concatenate(limits), bounds=list(zip(low, high, strict=True))
        )
        if solved.status == 0:
            best = min(best, solved.fun + float((weight @ constant + bias)[0]))
    return best


@pytest.mark.parametrize("seed", range(4))
def test_tiny_networks_never_fall_below_their_bounds(seed: int) -> None:
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    x, y, eps = torch.rand(1, 3), torch.tensor([0]), 0.3
    margins = all_margins(network, x, y, eps)
    layers = [(m.weight.detach().numpy(), m.bias.detach().numpy()) for m in network if isinstance(m, nn.Linear)]
    weight, bias = layers[-1]
    layers[-1] = (weight[:1] - weight[1:], bias[:1] - bias[1:])
    box = linf_box(x, eps)
    exact = exact_minimum(layers, box.lower[0].numpy(), box.upper[0].numpy())
    for kind, bound in margins.items():
        assert float(bound[0, 1]) <= exact + 1e-5, kind
    # One symbolic step loses less than intervals all the way, and none of it is vacuous.
    assert float(margins["symbolic"][0, 1]) > exact - 0.5
    assert float(margins["ibp"][0, 1]) < float(margins["symbolic"][0, 1]) + 1e-5


def test_one_relu_is_bounded_by_its_chord_exactly() -> None:
    """margin = 1 - relu(2 x - 1) on [0.3, 0.9]: the minimum is at the end, and the chord passes through it."""
    network = nn.Sequential(nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 2))
    with torch.no_grad():
        for parameter, values in zip(network.parameters(), ([[2.0]], [-1.0], [[-1.0], [0.0]], [1.0, 0.0]), strict=True):
            parameter.copy_(torch.tensor(values))
    for margins in all_margins(network, torch.tensor([[0.6]]), torch.tensor([0]), 0.3).values():
        assert float(margins[0, 1]) == pytest.approx(1.0 - 0.8, abs=1e-6)


def affine_of(layers: list[nn.Module], shape: torch.Size) -> tuple[np.ndarray, np.ndarray]:
    """The matrix and constant of a chain of affine layers, in float64, from its outputs for the unit vectors."""
    chain = nn.Sequential(*layers)
    with torch.no_grad():
        count = int(np.prod(shape))
        constant = chain(torch.zeros(1, *shape)).flatten().double()
        columns = chain(torch.eye(count).view(count, *shape)).flatten(1).double() - constant
    return columns.T.numpy(), constant.numpy()


def dense_form(network: nn.Sequential, shape: torch.Size) -> list[tuple[np.ndarray, np.ndarray]]:
    """Matrices and constants between the ReLUs of a sequential network."""
    forms, chain, value = [], [], torch.zeros(1, *shape)
    for layer in network:
        if isinstance(layer, nn.ReLU):
            forms.append(affine_of(chain, value.shape[1:]))
            with torch.no_grad():
                value = nn.Sequential(*chain)(value)
            chain = []
        else:
            chain.append(layer)
    return [*forms, affine_of(chain, value.shape[1:])]


def interval(
    matrix: np.ndarray, constant: np.ndarray, low: np.ndarray, high: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    positive, negative = np.maximum(matrix, 0), np.minimum(matrix, 0)
    return positive @ low + negative @ high + constant, positive @ high + negative @ low + constant


def crown_ibp_reference(forms: list[tuple[np.ndarray, np.ndarray]], low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Zhang et al. 2020: boxes by intervals, then Lambda and its constants from the last layer to the first."""
    boxes = [(low, high)]
    for matrix, constant in forms[:-1]:
        box = interval(matrix, constant, *boxes[-1])
        boxes.append(box)
        boxes.append((np.maximum(box[0], 0), np.maximum(box[1], 0)))
    matrix, constant = forms[-1]
    result = constant.copy()
    for (weight, bias), (under, over) in zip(forms[-2::-1], boxes[-2::-2], strict=True):
        chord = np.where(under >= 0, 1.0, np.where(over <= 0, 0.0, over / np.where(over > under, over - under, 1.0)))
        below = np.where(under >= 0, 1.0, np.where(over <= 0, 0.0, over > -under))
        height = np.where((under < 0) & (over > 0), -under * chord, 0.0)
        positive, negative = np.maximum(matrix, 0), np.minimum(matrix, 0)
        result += negative @ height
        matrix = positive * below + negative * chord
        result += matrix @ bias
        matrix = matrix @ weight
    return interval(matrix, result, low, high)[0]


def zonotope_reference(forms: list[tuple[np.ndarray, np.ndarray]], low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Symbolic intervals forwards: a center, and one symbol in [-1, 1] for each pixel and each undecided ReLU."""
    center, symbols = (low + high) / 2, np.diag((high - low) / 2)
    box = (low, high)
    for weight, bias in forms[:-1]:
        center, symbols = weight @ center + bias, weight @ symbols
        reach, plain = np.abs(symbols).sum(axis=1), interval(weight, bias, *box)
        under, over = np.maximum(center - reach, plain[0]), np.minimum(center + reach, plain[1])
        slope = np.where(under >= 0, 1.0, np.where(over <= 0, 0.0, over / np.where(over > under, over - under, 1.0)))
        error = np.where((under < 0) & (over > 0), -under * slope / 2, 0.0)
        center, symbols = slope * center + error, np.concatenate([slope[:, None] * symbols, np.diag(error)], axis=1)
        box = (np.maximum(under, 0), np.maximum(over, 0))
    weight, bias = forms[-1]
    return weight @ center + bias - np.abs(weight @ symbols).sum(axis=1)


@pytest.mark.parametrize("eps", [0.01, 0.1, 0.4])
@pytest.mark.parametrize("seed", range(3))
def test_margins_are_those_of_the_papers_formulas(seed: int, eps: float) -> None:
    torch.manual_seed(seed)
    norm = nn.BatchNorm2d(3)
    layers = [nn.Conv2d(1, 3, 3, 2, 1), norm, nn.ReLU(), nn.Conv2d(3, 4, 2, bias=False), nn.ReLU(), nn.Flatten()]
    network = nn.Sequential(*layers, nn.Linear(16, 6), nn.ReLU(), nn.Linear(6, CLASSES))
    assert norm.running_mean is not None
    assert norm.running_var is not None
    norm.running_mean.uniform_(-0.5, 0.5)
    norm.running_var.uniform_(0.1, 2.0)
    network.eval()
    x, y = torch.rand(1, 1, 6, 6), torch.tensor([2])
    box = linf_box(x, eps)
    low, high = (bound.flatten().double().numpy() for bound in box)
    forms = dense_form(network, x.shape[1:])
    differences = np.eye(CLASSES)[2] - np.eye(CLASSES)
    forms[-1] = (differences @ forms[-1][0], differences @ forms[-1][1])
    margins = {kind: value[0].detach().numpy() for kind, value in all_margins(network, x, y, eps).items()}

    def assert_close(actual: np.ndarray, expected: np.ndarray) -> None:
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=2e-5)

    assert_close(margins["crown_ibp"], crown_ibp_reference(forms, low, high))
    assert_close(margins["symbolic"], zonotope_reference(forms, low, high))
    for matrix, constant in forms[:-1]:
        low, high = (np.maximum(bound, 0) for bound in interval(matrix, constant, low, high))
    assert_close(margins["ibp"], interval(*forms[-1], low, high)[0])


def test_merging_the_last_layer_is_never_looser_than_subtracting_logits() -> None:
    network, y = network_named("plain"), torch.tensor([0])
    bounds = interval_bounds(trace(network), linf_box(image(), 0.05))
    apart = bounds.logits.lower[:, :1] - bounds.logits.upper
    merged = bounds.interval_margins(y)
    assert bool((merged[:, 1:] > apart[:, 1:] + 1e-4).all())


def assert_adjoint(operation: Operation, x: Tensor) -> None:
    """For an affine operation sum(a * f(x)) = sum(coefficients * x) + constant, and its box of a point is f(x)."""
    box = Box(x, x)
    value = operation.interval(box).lower
    a = torch.randn(x.shape[0], 3, *value.shape[1:])
    (coefficients,), low, high = operation.bound_backward(a, (box,), parallel=True)
    expected = (a * value.unsqueeze(1)).flatten(2).sum(2)
    for constant in (low, high):
        total = (coefficients * x.unsqueeze(1)).flatten(2).sum(2) + constant
        torch.testing.assert_close(total, expected, rtol=1e-4, atol=1e-3)


@given(st.data())
@settings(max_examples=25)
def test_backward_bounds_of_convolutions_are_exact_for_any_geometry(data: st.DataObject) -> None:
    def pair(low: int, high: int) -> tuple[int, int]:
        return data.draw(st.tuples(st.integers(low, high), st.integers(low, high)))

    groups = data.draw(st.sampled_from([1, 2]))
    layer = nn.Conv2d(
        4, 6, pair(1, 3), pair(1, 3), pair(0, 2), pair(1, 2), groups=groups, bias=data.draw(st.booleans())
    )
    x = torch.rand(2, 4, *pair(5, 9))
    operation = MODULES[nn.Conv2d](layer)({})
    torch.testing.assert_close(operation.interval(Box(x, x)).lower, layer(x), rtol=1e-4, atol=1e-5)
    assert_adjoint(operation, x)


@given(st.data())
@settings(max_examples=25)
def test_backward_bounds_of_average_pooling_are_exact_for_any_geometry(data: st.DataObject) -> None:
    kernel = data.draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    layer = data.draw(
        st.sampled_from(
            [
                nn.AvgPool2d(
                    kernel,
                    data.draw(st.sampled_from([None, 1, 2, (3, 2)])),
                    padding=data.draw(st.integers(0, min(kernel) // 2)),
                    ceil_mode=data.draw(st.booleans()),
                    count_include_pad=data.draw(st.booleans()),
                ),
                nn.AdaptiveAvgPool2d(data.draw(st.sampled_from([1, 3, (2, None), (5, 4)]))),
            ]
        )
    )
    x = torch.rand(2, 3, data.draw(st.integers(5, 9)), data.draw(st.integers(5, 9)))
    operation = MODULES[type(layer)](layer)({})
    torch.testing.assert_close(operation.interval(Box(x, x)).lower, layer(x), rtol=1e-4, atol=1e-5)
    assert_adjoint(operation, x)


ENDS = st.floats(-2.0, 2.0, width=32) | st.sampled_from([0.0, -1e-8, 1e-8, 1e-30, -1e-30, 3e-7])


@given(ENDS, ENDS, st.floats(-3.0, 3.0, width=32), st.booleans())
@settings(max_examples=100)
def test_the_lines_of_a_relu_hold_on_its_box_and_have_finite_gradients(
    one: float, other: float, a: float, parallel: bool
) -> None:
    lower = torch.tensor([[min(one, other)]], requires_grad=True)
    upper = torch.tensor([[max(one, other)]], requires_grad=True)
    coefficient = torch.tensor([[[a]]], requires_grad=True)
    (coefficients,), low, high = Relu().bound_backward(coefficient, (Box(lower, upper),), parallel)
    x = torch.linspace(0, 1, 21) * (upper - lower).detach() + lower.detach()
    value = a * x.relu()
    slack = 1e-6 * (1 + value.abs())
    assert bool((coefficients[0] * x + low <= value + slack).all())
    if parallel:
        assert bool((coefficients[0] * x + high >= value - slack).all())
    low = torch.as_tensor(low)
    for grad in torch.autograd.grad(coefficients.sum() + low.sum(), [lower, upper, coefficient], allow_unused=True):
        assert grad is None or float(grad.abs()) < 1e7


@given(st.integers(0, 10_000), st.sampled_from([(2, 2, 0), (3, 2, 1), (3, 1, 1)]), st.sampled_from([0.0, 0.05, 0.5]))
@settings(max_examples=30)
def test_the_lines_of_max_pooling_hold_on_its_box(seed: int, geometry: tuple[int, int, int], width: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    kernel, stride, padding = geometry
    # Few distinct values: windows with ties, and decided windows.
    lower = torch.randint(-3, 3, (1, 2, 6, 6), generator=generator) / 2
    upper = lower + width * torch.randint(0, 3, lower.shape, generator=generator)
    pool = MaxPool((kernel, kernel), (stride, stride), (padding, padding))
    share = torch.rand(50, 2, 6, 6, generator=generator)
    share[::2] = share[::2].round()
    points = lower + share * (upper - lower)
    pooled = F.max_pool2d(points, kernel, stride, padding)
    a = torch.randn(1, 5, *pooled.shape[1:], generator=generator)
    values = (a * pooled.unsqueeze(1)).flatten(2).sum(2)
    for parallel in (False, True):
        (coefficients,), low, high = pool.bound_backward(a, (Box(lower, upper),), parallel)
        linear = (coefficients * points.unsqueeze(1)).flatten(2).sum(2)
        assert bool((linear + low <= values + 1e-4).all())
        if parallel:
            assert bool((linear + high >= values - 1e-4).all())
        if width == 0:
            torch.testing.assert_close(linear + low, values, rtol=1e-4, atol=1e-4)


def test_symbolic_intervals_are_tighter_on_a_network_of_trained_scale() -> None:
    network, x, y = network_named("plain", seed=5), image(5, 2), torch.arange(2)
    margins = all_margins(network, x, y, 0.03)
    means = {kind: float(value[:, 2:].mean()) for kind, value in margins.items()}
    assert means["ibp"] < means["crown_ibp"] < means["symbolic"]
    assert means["ibp"] < means["symbolic ibp"]


def loss_of(bounds: Bounds, kind: str, y: Tensor) -> Tensor:
    margins = bounds.interval_margins(y) if kind == "ibp" else bounds.linear_margins(y, kind == "symbolic")
    return F.cross_entropy(-margins, y)


@pytest.mark.parametrize("kind", ["ibp", "crown_ibp", "symbolic"])
def test_gradients_reach_scores_as_finite_differences_say(kind: str) -> None:
    """dL/ds = dL/dw_eff * w * sign(s), and dL/dw_eff by differences of a plain network with the effective weights."""
    network = network_named("small_cnn masked").double()
    train_only(network, "scores")
    x, y = image(6, 2).double(), torch.tensor([0, 3])
    propagate = symbolic_bounds if kind == "symbolic" else interval_bounds

    def loss(some: Network) -> Tensor:
        return loss_of(propagate(graphs[some], linf_box(x, 0.03)), kind, y)

    plain = network_named("small_cnn").double().requires_grad_(False)
    plain.backbone.load_state_dict(effective_state(network))
    graphs = {some: trace(some) for some in (network, plain)}
    loss(network).backward()
    state, live = named_state(network), named_state(plain)
    compared = 0
    for name in maskable(plain):
        effective, score = live[f"weight/{name}"].view(-1), state[f"score/{name}"]
        assert score.grad is not None
        steepest = score.grad.view(-1).abs()
        for subset in (effective != 0, effective == 0):
            index = int(steepest.where(subset, -1.0).argmax())
            at, step = float(effective[index]), 1e-6
            sides = []
            for value in (at + step, at - step):
                effective[index] = value
                sides.append(float(loss(plain)))
            effective[index] = at
            weight, sign = state[f"weight/{name}"].detach().view(-1)[index], score.detach().view(-1)[index].sign()
            expected = (sides[0] - sides[1]) / (2 * step) * float(weight * sign)
            assert float(score.grad.view(-1)[index]) == pytest.approx(expected, rel=1e-3, abs=1e-7), (name, index)
            compared += abs(expected) > 1e-5
    assert compared >= 7, "differences of nothing"


def test_a_graph_stays_valid_when_weights_masks_and_mode_change() -> None:
    network, box, y = network_named("residual"), linf_box(image(), 0.02), torch.tensor([0])
    scores = Scores.attach(network, Decimal("0.1"))
    graph = trace(network)
    before = interval_bounds(graph, box).linear_margins(y)
    with torch.no_grad():
        for name, tensor in named_state(network).items():
            if name.startswith("score/"):
                tensor.copy_(torch.rand(tensor.shape, generator=torch.Generator().manual_seed(1)))
    scores.refresh()
    after = interval_bounds(graph, box).linear_margins(y)
    assert not torch.allclose(before, after)
    assert torch.equal(after, interval_bounds(trace(network), box).linear_margins(y))


@pytest.mark.parametrize("name", ["residual", "small_cnn masked"])
def test_batch_norm_in_training_normalises_by_the_clean_batch(name: str) -> None:
    """At eps 0 logits and all gradients, those through the batch's statistics too, are the clean forward's."""
    network = network_named(name).train()
    x, y = image(7, 6), torch.tensor([0, 1, 2, 3, 0, 1])
    parameters = [p for p in network.parameters() if p.requires_grad]
    with batch_statistics_of(network) as statistics:
        clean = network(x)
    expected = torch.autograd.grad(F.cross_entropy(clean, y), parameters, retain_graph=True)
    counted = {n: b.clone() for n, b in network.named_buffers()}
    bounds = interval_bounds(trace(network), linf_box(x, 0.0), statistics)
    torch.testing.assert_close(bounds.logits.lower, clean, rtol=1e-3, atol=1e-4)
    for margins in (bounds.interval_margins(y), bounds.linear_margins(y)):
        grads = torch.autograd.grad(F.cross_entropy(-margins, y), parameters, retain_graph=True)
        for grad, target in zip(grads, expected, strict=True):
            torch.testing.assert_close(grad, target, rtol=1e-2, atol=2e-3 * float(target.abs().max()) + 1e-6)
    assert all(torch.equal(buffer, counted[n]) for n, buffer in network.named_buffers())
    assert not any(module._forward_hooks for module in network.modules())
    with pytest.raises(ValueError, match=r"bn1.*BatchNorm2d.* batch_statistics_of"):
        interval_bounds(trace(network), linf_box(x, 0.0))


def test_autocast_does_not_reach_the_bounds() -> None:
    network, y = network_named("pooled"), torch.tensor([0])

    def margins() -> list[Tensor]:
        box, graph = linf_box(image(), 0.05), trace(network)
        bounds, symbolic = interval_bounds(graph, box), symbolic_bounds(graph, box)
        return [bounds.interval_margins(y), bounds.linear_margins(y), symbolic.linear_margins(y, parallel=True)]

    expected = margins()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert network(image()).dtype == torch.bfloat16
        under = margins()
    assert all(torch.equal(one, other) for one, other in zip(under, expected, strict=True))


def test_proved_needs_every_wrong_class() -> None:
    margins = torch.tensor([[0.0, 1.0, 2.0], [0.0, 1.0, -0.1], [0.1, 0.0, 0.2], [0.1, 0.0, 0.0]])
    assert proved(margins, torch.tensor([0, 0, 1, 1])).tolist() == [True, False, True, False]


class Odd(nn.Module):
    """A network whose forward is a given function."""

    def __init__(self, what: object, *layers: nn.Module) -> None:
        super().__init__()
        self.what = what
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.what(self, x)  # pyright: ignore[reportCallIssue]


class Standardised(nn.Conv2d):
    """A subclass of Conv2d that overrides forward."""

    def forward(self, input: Tensor) -> Tensor:
        return F.conv2d(input, self.weight - self.weight.mean(), self.bias)


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (nn.Sequential(Standardised(3, 4, 3)), r"0 \(Standardised\) .*no bounds"),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.SiLU()), r"1 \(SiLU\) cannot be bounded.*supported are Conv2d, Linear, "),
        (nn.Sequential(nn.Conv2d(3, 4, 3, padding="same")), r"0 \(Conv2d\) .*'same'"),
        (nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect")), r"0 \(Conv2d\) .*'reflect'"),
        (nn.Sequential(nn.MaxPool2d(3, dilation=2)), r"0 \(MaxPool2d\) .*dilation"),
        (nn.Sequential(nn.MaxPool2d(3, ceil_mode=True)), r"0 \(MaxPool2d\) .*ceil_mode"),
        (nn.Sequential(nn.AvgPool2d(3, divisor_override=2)), r"0 \(AvgPool2d\) .*divisor_override 2"),
        (nn.Sequential(nn.Flatten(2)), r"0 \(Flatten\) .*flatten from 2 to -1"),
        (Odd(lambda self, x: torch.cat([x, x], 1)), r"cat \(cat\) .*no bounds"),
        (Odd(lambda self, x: x * x), r"mul \(mul\) .*only the sum"),
        (Odd(lambda self, x: 1.0 / x), r"truediv \(truediv\) .*constant second"),
        (Odd(lambda self, x: torch.add(x, x, alpha=2)), r"add \(add\) .*alpha"),
        (Odd(lambda self, x: (x, x)), "Odd cannot be bounded: it returns more than logits"),
        (Odd(lambda self, x: x if x.sum() > 0 else -x), "Odd cannot be bounded: .*branches"),
        (Odd(lambda self, x: (y := x + 1.0).relu_() + y), r"relu_ \(relu_\) .*in place"),
        (Odd(lambda self, x: self.layers[0](x) + x, nn.ReLU(inplace=True)), r"layers.0 \(ReLU\) .*in place"),
    ],
)
def test_unsupported_layers_are_named(network: nn.Module, message: str) -> None:
    with pytest.raises(ValueError, match=f"(?s){message}"):
        trace(network)


def test_dropout_in_training_is_refused_when_bounds_are_taken() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Dropout(0.3), nn.Linear(192, 2))
    graph = trace(network)
    with pytest.raises(ValueError, match=r"1 \(Dropout\) .*p 0.3"):
        interval_bounds(graph, linf_box(image(), 0.1))
    network.eval()
    interval_bounds(graph, linf_box(image(), 0.1))


def test_functions_and_layers_are_the_same_operations() -> None:
    assert FUNCTIONS[F.max_pool2d](3, 2, 1)({}) == MODULES[nn.MaxPool2d](nn.MaxPool2d(3, 2, 1))({})
    assert FUNCTIONS[F.relu]()({}) == MODULES[nn.ReLU](nn.ReLU())({})


class Fixed(nn.Module):
    """A small residual network whose weights are sines, the same in every version of torch."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm = nn.Conv2d(1, 3, 3, 2, 1), nn.BatchNorm2d(3)
        self.conv2, self.conv3 = nn.Conv2d(3, 3, 3, 1, 1), nn.Conv2d(3, 4, 3)
        self.hidden, self.fc = nn.Linear(4, 5), nn.Linear(5, 3)
        with torch.no_grad():
            for seed, (name, tensor) in enumerate(sorted(self.state_dict().items())):
                if tensor.is_floating_point():
                    tensor.copy_(0.5 * torch.sin(torch.arange(tensor.numel()) * 1.7 + seed).view_as(tensor))
                if name == "norm.running_var":
                    tensor.abs_().add_(0.1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.conv1(x)))
        x = torch.relu(self.conv2(x)) + x
        x = torch.flatten(torch.relu(self.conv3(x)), 1)
        return self.fc(torch.relu(self.hidden(x)))


FIXED_IMAGES = 0.5 + 0.5 * torch.sin(torch.arange(2 * 6 * 6) * 0.9).view(2, 1, 6, 6)
FIXED_LABELS = torch.tensor([0, 2])


@pytest.mark.parametrize(
    ("eps", "ibp", "crown_ibp"),
    [
        (
            0.01,
            [[0.0, -0.169465, 0.746961], [-0.287447, -0.607036, 0.0]],
            [[0.0, -0.048691, 0.865761], [-0.22243, -0.57673, 0.0]],
        ),
        (
            0.05,
            [[0.0, -1.189276, -0.286779], [-1.063846, -1.242024, 0.0]],
            [[0.0, -0.6346, 0.427158], [-0.605652, -0.970389, 0.0]],
        ),
    ],
)
def test_margins_are_those_of_auto_lirpa(eps: float, ibp: list[list[float]], crown_ibp: list[list[float]]) -> None:
    """Numbers of auto_LiRPA 0.3 (methods IBP and CROWN-IBP, the same boxes), whose pins keep it out of this suite.

    test_bounds_of_others.py runs another library.
    """
    margins = all_margins(Fixed().eval(), FIXED_IMAGES, FIXED_LABELS, eps)
    torch.testing.assert_close(margins["ibp"], torch.tensor(ibp), rtol=0, atol=5e-6)
    torch.testing.assert_close(margins["crown_ibp"], torch.tensor(crown_ibp), rtol=0, atol=5e-6)
