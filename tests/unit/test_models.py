"""Networks: names, normalisation inside, initialisation from the seed alone."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch.nn import functional as F
from torchvision.transforms.v2.functional import normalize

from pipeline.models import build_network
from pipeline.models.small_cnn import GRID, grid_average, small_cnn
from pipeline.recipe_sections import Model

SMALL = Model(arch="small_cnn", num_classes=10)


@pytest.mark.parametrize("size", [16, 28, 32, 33, 64])
def test_small_cnn_takes_any_image_size(size: int) -> None:
    images = torch.rand(3, 3, size, size)
    assert build_network(SMALL, 0)(images).shape == (3, 10)


def test_small_cnn_has_the_documented_size() -> None:
    parameters = sum(p.numel() for p in small_cnn(10).parameters())
    assert round(parameters / 1e6, 2) == 0.83


@pytest.mark.parametrize(("height", "width"), [(2, 2), (4, 4), (5, 7), (8, 3)])
def test_grid_average_is_adaptive_average_pooling(height: int, width: int) -> None:
    features = torch.rand(2, 3, height, width, requires_grad=True)
    expected = F.adaptive_avg_pool2d(features, GRID)
    actual = grid_average(features)
    torch.testing.assert_close(actual, expected)
    (expected_grad,) = torch.autograd.grad(expected.square().sum(), features)
    (actual_grad,) = torch.autograd.grad(actual.square().sum(), features)
    torch.testing.assert_close(actual_grad, expected_grad)


def test_normalisation_is_the_first_layer() -> None:
    model = Model(arch="small_cnn", num_classes=10, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    network = build_network(model, 0).eval()
    images = torch.rand(4, 3, 28, 28)
    normalised = normalize(images, [0.1, 0.2, 0.3], [0.5, 0.6, 0.7])
    torch.testing.assert_close(network(images), network.backbone(normalised))


def test_normalisation_is_not_state() -> None:
    network = build_network(SMALL, 0)
    assert set(network.state_dict()) == {f"backbone.{name}" for name in network.backbone.state_dict()}


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_resnets_are_torchvisions(arch: str) -> None:
    with torch.device("meta"):  # names and shapes only
        network = build_network(Model.model_validate({"arch": arch, "num_classes": 7}), 0)
        plain = torchvision.models.get_model(arch, num_classes=7)
    shapes = {name: tensor.shape for name, tensor in network.backbone.state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in plain.state_dict().items()}
    assert type(network.backbone) is type(plain)


def test_initialisation_is_a_function_of_the_seed_alone() -> None:
    torch.manual_seed(5)
    first = build_network(SMALL, 1).state_dict()
    after_first = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(3), after_first), "building a network moved the caller's random state"
    second, other = build_network(SMALL, 1).state_dict(), build_network(SMALL, 2).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["backbone.conv1.weight"], other["backbone.conv1.weight"])
