"""Multiply-accumulates and kept weights agree with torch's own counter, and with counting by hand."""

from __future__ import annotations

from decimal import Decimal

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from pipeline.models import Network, build_network
from pipeline.models.cost import Cost, multiply_accumulates, network_cost
from pipeline.models.pruning.scores import Scores
from pipeline.recipe.sections import Model

SIZES = {
    "small_cnn": 28,
    "cnn_small": 28,
    "vgg4_bn_cifar": 32,
    "wrn_28_4": 32,
    "resnet18_w16_cifar": 28,
    "resnet50": 64,
}


def network_of(arch: str) -> Network:
    return build_network(
        Model(arch=arch, num_classes=10, mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2)), seed=0, image_size=SIZES[arch]
    )


@pytest.mark.parametrize("arch", SIZES)
def test_torchs_counter_finds_twice_as_many_operations(arch: str) -> None:
    network = network_of(arch).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(torch.zeros(1, 3, SIZES[arch], SIZES[arch]))
    pooling = counter.get_flop_counts().get("Network.backbone.avgpool", {})  # may be a product of matrices
    counted = counter.get_total_flops() - sum(pooling.values())
    assert 2 * sum(multiply_accumulates(network, SIZES[arch]).values()) == counted


def test_each_layer_is_counted_under_its_plain_name() -> None:
    assert multiply_accumulates(network_of("small_cnn"), 28) == {
        "conv1": 3 * 32 * 3 * 3 * 14 * 14,
        "conv2": 32 * 64 * 3 * 3 * 7 * 7,
        "fc1": 64 * 7 * 7 * 256,
        "fc2": 256 * 10,
    }


def test_counting_leaves_the_network_as_it_was() -> None:
    network = network_of("small_cnn").train()
    network.backbone.get_submodule("bn1").eval()
    state = {name: tensor.clone() for name, tensor in network.backbone.state_dict().items()}
    multiply_accumulates(network, 28)
    assert {name for name, module in network.named_modules() if not module.training} == {"backbone.bn1"}
    assert not any(module._forward_hooks for module in network.modules())
    assert all(torch.equal(tensor, state[name]) for name, tensor in network.backbone.state_dict().items())


def test_masked_weights_count_and_are_not_kept() -> None:
    network = network_of("small_cnn")
    Scores.attach(network, Decimal("0.5"))
    rows = [(3 * 32 * 9, 14 * 14), (32 * 64 * 9, 7 * 7), (64 * 7 * 7 * 256, 1), (256 * 10, 1)]
    assert network_cost(network, 28) == Cost(
        parameters=sum(size for size, _ in rows),
        kept_parameters=sum(size // 2 for size, _ in rows),
        multiply_accumulates=sum(size * places for size, places in rows),
        kept_multiply_accumulates=sum(size // 2 * places for size, places in rows),
    )
