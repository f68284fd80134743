"""Networks: sizes and names, built-in normalisation, seeded initialisation, suitability for pruning and tracing."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path

import pytest
import torch
import torchvision
from torch import fx, nn
from torch.nn import functional as F
from torchvision.transforms.v2.functional import normalize

from pipeline.models import Network, build_network, check_micro_batch
from pipeline.models.architectures.from_torchvision import WITH_AUXILIARY_LOGITS
from pipeline.models.architectures.pooling import GridAverage
from pipeline.models.architectures.ra_resnet import Bottleneck
from pipeline.models.architectures.small_cnn import small_cnn
from pipeline.models.architectures.verified_cnn import cnn_small
from pipeline.models.architectures.vgg_cifar import WIDTHS
from pipeline.models.architectures.wide_resnet import WideResNet
from pipeline.models.network import BACKBONES, BACKBONES_OF_ONE_SIZE
from pipeline.models.pruning.scores import Scores, maskable
from pipeline.models.state import layer_counts
from pipeline.recipe.architectures import OWN, REFUSED, TORCHVISION, known_architecture
from pipeline.recipe.sections import Model

SMALL = Model(arch="small_cnn", num_classes=10)


@functools.cache
def on_meta(arch: str, num_classes: int = 10, image_size: int | None = 32) -> Network:
    """Names and shapes only; shared between tests, so read-only."""
    with torch.device("meta"):
        return build_network(Model(arch=arch, num_classes=num_classes), 0, image_size)


def num_parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def test_every_name_has_exactly_one_constructor() -> None:
    assert sorted(OWN + TORCHVISION) == sorted([*BACKBONES, *BACKBONES_OF_ONE_SIZE])
    assert sorted(TORCHVISION + REFUSED) == torchvision.models.list_models(module=torchvision.models)


@pytest.mark.parametrize(
    ("arch", "size"),
    [("resnet18", 32), ("resnet18", 64), ("resnet18_cifar", 32), ("vgg16_cifar", 32), ("small_cnn", 28)],
)
def test_a_micro_batch_of_one_image_is_refused_where_batchnorm_cannot_train_on_it(arch: str, size: int) -> None:
    model = Model(arch=arch, num_classes=10)
    network = build_network(model, 0, size).train()
    try:
        network(torch.rand(1, 3, size, size))
    except ValueError:
        assert (arch, size) in (("resnet18", 32), ("small_cnn", 28))
        with pytest.raises(
            ValueError, match=rf"batch.micro_batch 1: .*{arch} cannot .* set batch.micro_batch=2 or more"
        ):
            check_micro_batch(model, size, size, 1)
    else:
        check_micro_batch(model, size, size, 1)
    check_micro_batch(model, size, size, 2)


# Sizes


@pytest.mark.parametrize("size", [16, 28, 32, 33, 64])
def test_small_cnn_takes_any_image_size(size: int) -> None:
    images = torch.rand(3, 3, size, size)
    assert build_network(SMALL, 0)(images).shape == (3, 10)


@pytest.mark.parametrize("arch", ["small_cnn", "vgg16_bn_cifar", "wrn_28_4", "resnet18_cifar"])
@pytest.mark.parametrize("size", [28, 32, 64])
def test_cifar_networks_take_other_sizes_too(arch: str, size: int) -> None:
    assert on_meta(arch)(torch.empty(2, 3, size, size, device="meta")).shape == (2, 10)


@pytest.mark.parametrize("arch", BACKBONES_OF_ONE_SIZE)
def test_verified_cnns_take_the_size_they_were_built_for(arch: str) -> None:
    network = on_meta(arch, 10, 28)
    assert network(torch.empty(2, 3, 28, 28, device="meta")).shape == (2, 10)
    with pytest.raises(RuntimeError):
        network(torch.empty(2, 3, 32, 32, device="meta"))


def batch_norm(channels: int) -> int:
    return 2 * channels


def wrn_parameters(depth: int, width: int, num_classes: int) -> int:
    """From Zagoruyko & Komodakis 2016, table 1: 9 c c' per convolution, a 1 x 1 where the width changes."""
    total, channels = 3 * 16 * 9, 16
    for outputs in (16 * width, 32 * width, 64 * width):
        total += channels * outputs
        for _ in range((depth - 4) // 6):
            total += batch_norm(channels) + 9 * channels * outputs + batch_norm(outputs) + 9 * outputs * outputs
            channels = outputs
    return total + batch_norm(channels) + (channels + 1) * num_classes


@pytest.mark.parametrize(
    ("arch", "num_classes", "shape", "millions"),
    [
        ("wrn_28_4", 100, (28, 4), 5.87),
        ("wrn_28_10", 10, (28, 10), 36.48),
        ("wrn_28_10", 100, (28, 10), 36.54),
        ("wrn_34_10", 10, (34, 10), 46.16),
    ],
)
def test_wide_resnets_have_the_published_sizes(
    arch: str, num_classes: int, shape: tuple[int, int], millions: float
) -> None:
    parameters = num_parameters(on_meta(arch, num_classes))
    assert parameters == wrn_parameters(*shape, num_classes)
    assert round(parameters / 1e6, 2) == millions


@pytest.mark.parametrize(
    ("arch", "parameters"),
    # The CIFAR ResNets of the literature: 11.17, 21.28 and 23.52 M.
    [("resnet18_cifar", 11_173_962), ("resnet34_cifar", 21_282_122), ("resnet50_cifar", 23_520_842)],
)
def test_cifar_resnets_have_the_published_sizes(arch: str, parameters: int) -> None:
    assert num_parameters(on_meta(arch)) == parameters


def test_the_narrow_resnet_has_a_quarter_of_the_channels() -> None:
    wide, narrow = on_meta("resnet18_cifar"), on_meta("resnet18_w16_cifar")
    expected = {
        name: tuple(size if size in (1, 3, 10) else size // 4 for size in tensor.shape)
        for name, tensor in wide.state_dict().items()
    }
    assert {name: tuple(tensor.shape) for name, tensor in narrow.state_dict().items()} == expected
    by_layer = dict(wide.named_modules())
    for name, layer in narrow.named_modules():
        if isinstance(layer, nn.Conv2d):
            other = by_layer[name]
            assert isinstance(other, nn.Conv2d)
            assert (layer.stride, layer.padding) == (other.stride, other.padding)


def test_the_narrow_resnet_starts_like_torchvisions() -> None:
    """Kaiming normal over the outputs: the standard deviation is sqrt(2 / (outputs x k x k))."""
    network = build_network(Model(arch="resnet18_w16_cifar", num_classes=10), seed=3)
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d) and layer.weight.numel() > 10_000:
            expected = (2 / (layer.out_channels * layer.kernel_size[0] ** 2)) ** 0.5
            assert layer.weight.std().item() == pytest.approx(expected, rel=0.05)


def test_vgg16_has_the_published_trunk() -> None:
    """CIFAR's usual VGG-16 has 14,728,266 parameters, with biases on convolutions and one linear layer of 512 x 10."""
    network = on_meta("vgg16_bn_cifar").backbone
    assert isinstance(network.features, nn.Module)
    assert isinstance(network.classifier, nn.Module)
    biases = 2 * 64 + 2 * 128 + 3 * 256 + 6 * 512
    assert num_parameters(network.features) == 14_728_266 - biases - 513 * 10
    assert num_parameters(network.classifier) == (4 * 512 + 1) * 256 + 257 * 256 + 257 * 10


@pytest.mark.parametrize("depth", WIDTHS)
def test_vggs_have_the_depth_in_their_name(depth: int) -> None:
    layers = [m for m in on_meta(f"vgg{depth}_cifar").modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    convolutions = sum(isinstance(layer, nn.Conv2d) for layer in layers)
    assert depth == (convolutions if depth < 11 else len(layers))


@pytest.mark.parametrize("size", [28, 32])
def test_verified_cnns_have_the_sizes_of_their_layers(size: int) -> None:
    side = size // 4
    small = (3 * 16 + 1) * 16 + (16 * 16 + 1) * 32 + (32 * side**2 + 1) * 100 + 101 * 10
    assert num_parameters(on_meta("cnn_small", 10, size)) == small
    convolutions = 32 * (27 + 1) + 32 * (512 + 1) + 64 * (288 + 1) + 64 * (1024 + 1)
    large = convolutions + 512 * (64 * side**2 + 1) + 512 * 513 + 10 * 513
    assert num_parameters(on_meta("cnn_large", 10, size)) == large


def documented_sizes() -> list[tuple[str, int, float]]:
    """(arch, classes, millions of parameters) of the table in docs/recipes.md."""
    text = (Path(__file__).parents[3] / "docs" / "recipes.md").read_text(encoding="utf-8")
    table = text.partition("### Networks")[2].partition("### ")[0]
    rows = [line.split("|")[2:5] for line in table.splitlines() if line.startswith("|")]
    return [
        (arch, 1000 if "224" in images else 10, float(millions))
        for archs, sizes, images in rows
        if sizes.strip() and "`" in archs
        for arch, millions in zip(re.findall(r"`(\w+)`", archs), re.findall(r"\d+\.\d+", sizes), strict=True)
    ]


@pytest.mark.parametrize(("arch", "num_classes", "millions"), documented_sizes())
def test_documented_sizes(arch: str, num_classes: int, millions: float) -> None:
    assert round(num_parameters(on_meta(arch, num_classes, 32 if num_classes == 10 else 224)) / 1e6, 2) == millions


def test_documented_sizes_cover_all_our_networks() -> None:
    without_batch_norm = {f"vgg{depth}_cifar" for depth in WIDTHS}
    assert {arch for arch, _, _ in documented_sizes()} >= set(OWN) - without_batch_norm


# Unsupported image sizes


def test_a_network_of_one_size_asks_for_it() -> None:
    with pytest.raises(ValueError, match="cnn_small is built for images of one size; give image_size"):
        build_network(Model(arch="cnn_small", num_classes=10), 0)


@pytest.mark.parametrize(("arch", "size"), [("vgg16_bn_cifar", 8), ("squeezenet1_1", 8)])
def test_images_too_small_are_refused_when_the_network_is_built(arch: str, size: int) -> None:
    words = f"model.arch {arch} cannot take images of data.image_size {size} .*; change one of them"
    with pytest.raises(ValueError, match=words) as caught:
        on_meta(arch, 10, size)
    assert "\n" not in str(caught.value)


def test_the_size_check_does_not_change_the_network() -> None:
    model = Model(arch="vgg2_bn_cifar", num_classes=3)
    checked, unchecked = build_network(model, 0, 32), build_network(model, 0)
    assert all(module.training for module in checked.modules())
    for name, tensor in unchecked.state_dict().items():
        assert torch.equal(checked.state_dict()[name], tensor), name


# Pooling


@pytest.mark.parametrize(("height", "width"), [(2, 2), (4, 4), (5, 7), (8, 3), (1, 6)])
@pytest.mark.parametrize(("rows", "columns"), [(7, 7), (2, 2), (5, 3)])
def test_grid_average_is_adaptive_average_pooling(height: int, width: int, rows: int, columns: int) -> None:
    features = torch.rand(2, 3, height, width, requires_grad=True)
    expected = F.adaptive_avg_pool2d(features, (rows, columns))
    actual = GridAverage(rows, columns)(features)
    torch.testing.assert_close(actual, expected)
    (expected_grad,) = torch.autograd.grad(expected.square().sum(), features)
    (actual_grad,) = torch.autograd.grad(actual.square().sum(), features)
    torch.testing.assert_close(actual_grad, expected_grad)


# Normalisation


def test_normalisation_is_the_first_layer() -> None:
    model = Model(arch="small_cnn", num_classes=10, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    network = build_network(model, 0).eval()
    images = torch.rand(4, 3, 28, 28)
    normalised = normalize(images, [0.1, 0.2, 0.3], [0.5, 0.6, 0.7])
    torch.testing.assert_close(network(images), network.backbone(normalised))


def test_normalisation_is_not_state() -> None:
    network = build_network(SMALL, 0)
    assert set(network.state_dict()) == {f"backbone.{name}" for name in network.backbone.state_dict()}


# torchvision's


@pytest.mark.parametrize("arch", ["resnet18", "resnet34", "resnet50", "vgg11_bn", "swin_t"])
def test_torchvisions_networks_have_its_names(arch: str) -> None:
    network = on_meta(arch, 7, image_size=224)
    with torch.device("meta"):
        plain = torchvision.models.get_model(arch, num_classes=7)
    shapes = {name: tensor.shape for name, tensor in network.backbone.state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in plain.state_dict().items()}
    assert type(network.backbone) is type(plain)


@pytest.mark.parametrize("arch", ["squeezenet1_1", "alexnet"])
@torch.no_grad()
def test_torchvision_loads_our_weights_and_gives_the_same_logits(arch: str) -> None:
    network = build_network(Model(arch=arch, num_classes=5, mean=(0, 0, 0), std=(1, 1, 1)), 0, image_size=96).eval()
    plain = torchvision.models.get_model(arch, num_classes=5).eval()
    plain.load_state_dict(network.backbone.state_dict(), strict=True)
    images = torch.rand(2, 3, 96, 96)
    expected = plain(images)
    torch.testing.assert_close(network(images), expected)
    assert float(expected.std()) > 0


@pytest.mark.parametrize("arch", ["squeezenet1_1", "efficientnet_b0"])
@torch.no_grad()
def test_training_draws_no_random_number(arch: str) -> None:
    """Plain torchvision's dropout and stochastic depth do, from an RNG state that checkpoints do not save."""
    images = torch.rand(4, 3, 64, 64)
    model = Model(arch=arch, num_classes=10)
    network, plain = build_network(model, 0), torchvision.models.get_model(arch, num_classes=10)

    def twice(trained: nn.Module) -> Iterator[torch.Tensor]:
        for seed in (1, 2):
            torch.manual_seed(seed)
            yield trained.train()(images)

    first, second = twice(network)
    assert torch.equal(first, second)
    first, second = twice(plain)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("arch", WITH_AUXILIARY_LOGITS)
def test_networks_with_auxiliary_logits_give_one_tensor_in_training(arch: str) -> None:
    images = torch.empty(2, 3, 299, 299, device="meta")
    assert on_meta(arch, 7, None)(images).shape == (2, 7)


def unscored_share(backbone: nn.Module) -> float:
    """Fraction of the parameters outside convolution, linear and normalisation layers."""
    layers = (nn.Conv2d, nn.Linear, nn.modules.batchnorm._NormBase, nn.LayerNorm)
    inside = {id(p) for m in backbone.modules() if isinstance(m, layers) for p in m.parameters(recurse=False)}
    return sum(p.numel() for p in backbone.parameters() if id(p) not in inside) / num_parameters(backbone)


@pytest.mark.parametrize("arch", [arch for arch in TORCHVISION if not arch.startswith("regnet")])
def test_every_torchvision_classifier_takes_its_images_and_is_almost_fully_prunable(arch: str) -> None:
    assert unscored_share(on_meta(arch, 7, 224).backbone) < 1e-3  # position tables and layer scales


@pytest.mark.parametrize("arch", ["regnet_x_400mf", "regnet_y_400mf"])
def test_regnets_take_their_images_and_can_be_pruned(arch: str) -> None:
    """Not on the meta device: torchvision computes their widths with tensors."""
    assert unscored_share(build_network(Model(arch=arch, num_classes=7), 0, 224).backbone) < 1e-3


@pytest.mark.parametrize("arch", ["vit_b_16", "vit_b_32"])
def test_unsupported_torchvision_networks_are_refused_with_the_reason(arch: str) -> None:
    with torch.device("meta"):
        assert 0.24 < unscored_share(torchvision.models.get_model(arch, num_classes=7)) < 0.26
    with pytest.raises(ValueError, match="its attention holds a quarter of the weights"):
        known_architecture(arch)


# Use by the rest of the pipeline


@pytest.mark.parametrize("arch", OWN)
def test_every_matrix_and_kernel_has_scores(arch: str) -> None:
    """Norm parameters and biases are vectors; tensors of two or more dimensions hold connections."""
    backbone = on_meta(arch).backbone
    connections = [name for name, parameter in backbone.named_parameters() if parameter.dim() > 1]
    assert list(maskable(backbone)) == connections


TINY = {
    "small_cnn": small_cnn,
    "cnn_small": lambda num_classes: cnn_small(num_classes, 16),
    "vgg4_bn_cifar": BACKBONES["vgg4_bn_cifar"],
    "wrn_10_2": lambda num_classes: WideResNet(10, 2, num_classes),
    "ra_resnet": lambda num_classes: nn.Sequential(
        nn.Conv2d(3, 32, 3), Bottleneck(32, 64, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, num_classes)
    ),
}


@pytest.mark.parametrize("name", TINY)
def test_pruned_networks_train_deterministically(name: str) -> None:
    torch.manual_seed(0)
    network = TINY[name](3)
    Scores.attach(network, Decimal("0.1"))
    assert all(layer["kept"] == -(-layer["total"] // 10) for layer in layer_counts(network))
    before = {key: value.clone() for key, value in network.state_dict().items()}
    images = torch.rand(4, 3, 16, 16)
    trained = dict(network.named_parameters())

    def gradients() -> tuple[torch.Tensor, ...]:
        network.load_state_dict(before)
        loss = F.cross_entropy(network(images), torch.tensor([0, 1, 2, 0]))
        return torch.autograd.grad(loss, list(trained.values()))

    torch.use_deterministic_algorithms(True)
    try:
        first, second = gradients(), gradients()
    finally:
        torch.use_deterministic_algorithms(False)
    for parameter, a, b in zip(trained, first, second, strict=True):
        assert torch.equal(a, b), parameter
        assert a.isfinite().all(), parameter
    assert all(a.any() for parameter, a in zip(trained, first, strict=True) if parameter.endswith("original"))


@pytest.mark.parametrize("arch", OWN)
def test_own_networks_can_be_traced(arch: str) -> None:
    """Bounds traverse the graph; pooling is the only function of this project that may appear in it."""
    graph = fx.symbolic_trace(on_meta(arch)).graph
    functions = {getattr(node.target, "__name__", "") for node in graph.nodes if node.op == "call_function"}
    of_torchvision = {"iadd", "flatten", "mul"}
    assert functions <= {"sub", "truediv", "add", "grid_average", *of_torchvision}
    assert "call_method" not in {node.op for node in graph.nodes}


@pytest.mark.parametrize("name", ["small_cnn", "vgg4_bn_cifar", "wrn_10_2"])
@torch.no_grad()
def test_a_traced_network_computes_the_same(name: str) -> None:
    network, images = TINY[name](3).eval(), torch.rand(2, 3, 20, 20)
    assert torch.equal(fx.symbolic_trace(network)(images), network(images))


# Initialisation


@pytest.mark.parametrize("arch", ["small_cnn", "vgg2_bn_cifar", "cnn_small", "squeezenet1_1"])
def test_initialisation_is_a_function_of_the_seed_alone(arch: str) -> None:
    model = Model(arch=arch, num_classes=10)
    torch.manual_seed(5)
    first = build_network(model, 1, 32).state_dict()
    after_first = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(3), after_first), "building a network must not change the caller's random state"
    second, other = build_network(model, 1, 32).state_dict(), build_network(model, 2, 32).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    kernel = next(name for name in first if first[name].dim() == 4)
    assert not torch.equal(first[kernel], other[kernel])


@pytest.mark.parametrize("arch", ["cnn_large", "vgg6_cifar", "wrn_28_4", "resnet18_cifar"])
def test_convolutions_have_he_normal_initial_weights(arch: str) -> None:
    """The sample deviation of n normal weights is within 5 standard errors, sigma / sqrt(2 n), of sigma."""
    network = build_network(Model(arch=arch, num_classes=10), 0, 32).backbone
    for layer in (m for m in network.modules() if isinstance(m, nn.Conv2d)):
        height, width = layer.kernel_size
        sigma = (2 / (height * width * layer.out_channels)) ** 0.5
        error = 5 * sigma / (2 * layer.weight.numel()) ** 0.5
        assert abs(float(layer.weight.detach().std()) - sigma) < error
