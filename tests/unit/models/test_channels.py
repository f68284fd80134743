"""Coupled channels: a network without them has the logits of the network in which they are masked."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import (
    convnext,
    densenet,
    efficientnet,
    googlenet,
    inception_v3,
    maxvit,
    mnasnet,
    mobilenetv2,
    mobilenetv3,
    regnet,
    resnet,
    shufflenetv2,
    squeezenet,
    swin_transformer,
    vgg,
)

from pipeline.models import Network, build_network
from pipeline.models.architectures.ra_resnet import Bottleneck
from pipeline.models.architectures.wide_resnet import WideResNet
from pipeline.models.export import load_model, write_model
from pipeline.models.pruning.channel_removal import Kept, channel_masks, read_channels, remove_channels
from pipeline.models.pruning.channel_trace import FIXED
from pipeline.models.pruning.channels import Channels, find_channels
from pipeline.models.pruning.multiply_accumulates import MultiplyAccumulates
from pipeline.recipe.architectures import OWN, TORCHVISION
from pipeline.recipe.sections import Model


def own(arch: str, size: int) -> nn.Module:
    return build_network(Model(arch=arch, num_classes=10), 0, size).backbone


def ra_resnet() -> nn.Module:
    """Two blocks of ra_resnet50, narrower: convolutions of two groups, squeeze-and-excitation."""
    pooled = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, 10))
    return nn.Sequential(nn.Conv2d(3, 16, 3), Bottleneck(16, 48, 2), Bottleneck(48, 48, 1), *pooled)


def pooled_vgg() -> nn.Module:
    features = vgg.make_layers([8, "M", 12], batch_norm=True)
    classifier = nn.Sequential(nn.Linear(12 * 4, 16), nn.ReLU(), nn.Linear(16, 10))
    return nn.Sequential(features, nn.AdaptiveAvgPool2d(2), nn.Flatten(), classifier)


def mobilenet_v3() -> nn.Module:
    block = partial(mobilenetv3.InvertedResidualConfig, width_mult=1.0)
    rows = [block(16, 3, 16, 16, True, "RE", 2, 1), block(16, 5, 48, 24, True, "HS", 1, 1)]
    return mobilenetv3.MobileNetV3([*rows, block(24, 5, 48, 24, False, "HS", 1, 1)], 40, num_classes=10)


def efficient() -> nn.Module:
    rows = [
        efficientnet.FusedMBConvConfig(2, 3, 2, 8, 16, 1),
        efficientnet.MBConvConfig(2, 3, 1, 16, 16, 2),
    ]
    return efficientnet.EfficientNet(rows, dropout=0.0, stochastic_depth_prob=0.0, num_classes=10, last_channel=32)


def regnet_y() -> nn.Module:
    stages = regnet.BlockParams([1, 2], [16, 48], [8, 16], [1.0, 1.0], [2, 2], 0.25)
    return regnet.RegNet(stages, num_classes=10, stem_width=8)


def convnext_tiny() -> nn.Module:
    blocks = [convnext.CNBlockConfig(8, 16, 1), convnext.CNBlockConfig(16, None, 1)]
    return convnext.ConvNeXt(blocks, num_classes=10)


def attention(**options: object) -> nn.Module:
    sizes = {"patch_size": [4, 4], "embed_dim": 8, "depths": [2, 1], "num_heads": [2, 2], "window_size": [2, 2]}
    return swin_transformer.SwinTransformer(**sizes, stochastic_depth_prob=0.0, num_classes=10, **options)  # pyright: ignore


def max_vit() -> nn.Module:
    return maxvit.MaxVit((64, 64), 8, 2, [8, 16], [1, 1], 4, 0.0, num_classes=10)


FAMILIES: dict[str, tuple[tuple[str, ...], int, Callable[[], nn.Module]]] = {
    "small_cnn": (("small_cnn",), 28, partial(own, "small_cnn", 28)),
    "small_cnn, pooled": ((), 40, partial(own, "small_cnn", 40)),
    "cnn": (("cnn_small", "cnn_large"), 28, partial(own, "cnn_small", 28)),
    "vgg_cifar": ((), 32, partial(own, "vgg2_bn_cifar", 32)),
    "vgg": (("vgg", "alexnet"), 32, pooled_vgg),
    "wide_resnet": (("wrn_",), 32, lambda: WideResNet(10, 2, 10)),
    "resnet": (("resnet", "wide_resnet"), 32, lambda: resnet.ResNet(resnet.Bottleneck, [1, 2, 1, 1], num_classes=10)),
    "resnet18_w16": ((), 32, partial(own, "resnet18_w16_cifar", 32)),
    "resnext": (
        ("resnext",),
        32,
        lambda: resnet.ResNet(resnet.Bottleneck, [1, 1, 1, 1], num_classes=10, groups=4, width_per_group=8),
    ),
    "ra_resnet": (("ra_resnet50",), 32, ra_resnet),
    "densenet": (("densenet",), 64, lambda: densenet.DenseNet(4, (2, 1, 1, 1), 8, num_classes=10)),
    "mobilenet_v2": (("mobilenet_v2",), 64, lambda: mobilenetv2.MobileNetV2(10, 0.1, dropout=0.0)),
    "mobilenet_v3": (("mobilenet_v3",), 64, mobilenet_v3),
    "mnasnet": (("mnasnet",), 64, lambda: mnasnet.MNASNet(0.1, 10, 0.0)),
    "efficientnet": (("efficientnet",), 64, efficient),
    "regnet": (("regnet",), 64, regnet_y),
    "shufflenet": (
        ("shufflenet",),
        64,
        lambda: shufflenetv2.ShuffleNetV2([1, 2, 1], [8, 16, 32, 64, 32], num_classes=10),
    ),
    "squeezenet": (("squeezenet",), 64, lambda: squeezenet.SqueezeNet("1_1", 10)),
    "convnext": (("convnext",), 64, convnext_tiny),
    "swin": (("swin_",), 64, attention),
    "swin_v2": (("swin_v2",), 64, partial(attention, block=swin_transformer.SwinTransformerBlockV2)),
    "maxvit": (("maxvit_t",), 64, max_vit),
}
"""Name -> the beginnings of the architectures that it stands for, image size, narrow network of their layers."""
WITH_OTHER_PRODUCTS = ("swin", "swin_v2", "maxvit", "small_cnn, pooled", "vgg_cifar")
"""Attention, and pooling to a grid by matrices, whose products are not counted."""
LARGE = {"googlenet": (googlenet, 64), "inception_v3": (inception_v3, 96)}
"""Which have no narrow form: without numbers."""


def test_every_shipped_architecture_has_a_family() -> None:
    beginnings = tuple(start for starts, _, _ in FAMILIES.values() for start in starts) + tuple(LARGE)
    assert [arch for arch in OWN + TORCHVISION if not arch.startswith(beginnings)] == []


@cache
def family(name: str) -> tuple[Network, Channels]:
    """With BatchNorm that is not the initial one, so that masked channels are not zero after it."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        _, size, build = FAMILIES[name]
        network = Network(build(), (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)).eval()
        for module in network.modules():
            if isinstance(module, _BatchNorm):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias)
                module.running_mean.normal_()  # pyright: ignore[reportOptionalMemberAccess]
                module.running_var.uniform_(0.5, 2.0)  # pyright: ignore[reportOptionalMemberAccess]
    return network, find_channels(network, size)


def images_of(name: str, count: int = 2) -> Tensor:
    size = FAMILIES[name][1]
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def random_kept(channels: Channels, share: float, seed: int) -> Kept:
    """Each channel with probability `share`, and at least one of each group."""
    generator = np.random.default_rng(seed)
    kept = generator.random(channels.count + 1) < share
    kept[FIXED] = True
    for group in range(1, len(channels.group_names)):
        if not kept[ids := np.flatnonzero(channels.groups == group)].any():
            kept[generator.choice(ids)] = True
    return kept


@torch.no_grad()
def masked(network: Network, channels: Channels, kept: Kept) -> Network:
    network = copy.deepcopy(network)
    for name, mask in channel_masks(channels, kept).items():
        weight = network.backbone.get_parameter(name)
        weight.mul_(mask.view(*mask.shape, *[1] * (weight.dim() - 2)))
    return network


@pytest.mark.parametrize("name", FAMILIES)
@settings(max_examples=3)
@given(share=st.floats(0.0, 1.0), seed=st.integers(0, 2**32))
def test_without_its_channels_a_network_has_the_masked_ones_logits(name: str, share: float, seed: int) -> None:
    network, channels = family(name)
    kept, images = random_kept(channels, share, seed), images_of(name)
    assert channels.count > 0
    zeros = masked(network, channels, kept)
    smaller, _ = remove_channels(zeros, channels, kept)
    with torch.inference_mode():
        expected, got = zeros(images), smaller(images)
        scale = max(1.0, float(expected.abs().max()))
        torch.testing.assert_close(got, expected, atol=1e-5 * scale, rtol=0)
        with FlopCounterMode(display=False) as counter:
            smaller(images[:1])
    costs = MultiplyAccumulates(channels)
    if name not in WITH_OTHER_PRODUCTS:
        assert costs.total(kept) == counter.get_total_flops() // 2
    layers = {layer: smaller.backbone.get_parameter(layer).shape for layer in channels.layers}
    for layer, count in costs.by_layer(kept).items():
        found = channels.layers[layer]
        assert count == found.positions * layers[layer].numel()
    np.testing.assert_array_equal(read_channels(zeros, channels) & ~kept, False)


@pytest.mark.parametrize("name", ["resnet18_w16", "mobilenet_v2", "ra_resnet", "densenet", "cnn"])
def test_a_channel_costs_what_goes_with_it(name: str) -> None:
    _, channels = family(name)
    costs, everything = MultiplyAccumulates(channels), np.ones(channels.count + 1, np.bool_)
    saved = costs.of_channels(channels)
    for channel in range(1, channels.count + 1, 1 + channels.count // 20):
        without = everything.copy()
        without[channel] = False
        assert saved[channel] == costs.total(everything) - costs.total(without)


@pytest.mark.parametrize("name", LARGE)
def test_concatenations_of_large_networks_are_followed(name: str) -> None:
    build, size = LARGE[name]
    with torch.device("meta"):
        channels = find_channels(build(num_classes=10, aux_logits=False, init_weights=False), size)
    producers = sum(len(layer.outputs) for layer in channels.layers.values()) - 10
    assert channels.count == producers, "no layer of theirs is tied to another"


def test_residual_streams_and_depthwise_convolutions_tie_their_layers() -> None:
    _, channels = family("resnet18_w16")
    stream = channels.layers["layer1.0.conv2.weight"].outputs
    for tied in ("conv1.weight", "layer1.1.conv2.weight"):
        np.testing.assert_array_equal(channels.layers[tied].outputs, stream)
    for reader in ("layer1.0.conv1.weight", "layer2.0.conv1.weight", "layer2.0.downsample.0.weight"):
        np.testing.assert_array_equal(channels.layers[reader].inputs, stream)
    assert not set(stream) & set(channels.layers["layer1.0.conv1.weight"].outputs)
    _, channels = family("mobilenet_v2")
    depthwise = next(layer for layer in channels.layers.values() if layer.conv_groups > 1)
    np.testing.assert_array_equal(depthwise.inputs, depthwise.outputs)


def test_flattening_repeats_a_channel_for_every_position() -> None:
    _, channels = family("small_cnn")
    conv, linear = channels.layers["conv2.weight"], channels.layers["fc1.weight"]
    np.testing.assert_array_equal(linear.inputs, conv.outputs.repeat(49))


def test_classes_and_what_is_mixed_stays() -> None:
    _, channels = family("convnext")
    assert not channels.layers["classifier.2.weight"].outputs.any()
    assert not channels.layers["features.0.0.weight"].outputs.any(), "LayerNorm averages over channels"
    assert not channels.layers["features.0.0.weight"].inputs.any(), "those of images"
    assert channels.layers["features.1.0.block.3.weight"].outputs.all()


def test_networks_are_left_alone() -> None:
    network, channels = family("small_cnn")
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    remove_channels(network, channels, random_kept(channels, 0.5, 0))
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, before[name])
    training = copy.deepcopy(network).train()
    find_channels(training, 28)
    assert all(module.training for module in training.modules())


def test_a_group_keeps_at_least_one_channel() -> None:
    network, channels = family("small_cnn")
    kept = channels.groups != 2
    with pytest.raises(ValueError, match=r"conv2.weight: no channel would be left; at least one must be"):
        remove_channels(network, channels, kept)


@pytest.mark.parametrize(("arch", "size"), [("small_cnn", 28), ("cnn_small", 28)])
def test_a_smaller_network_is_a_file_like_others(arch: str, size: int, tmp_path: Path) -> None:
    model = Model(arch=arch, num_classes=10)
    network = build_network(model, 1, size).eval()
    channels = find_channels(network, size)
    smaller, widths = remove_channels(network, channels, random_kept(channels, 0.3, 2))
    path, images = tmp_path / "model.safetensors", torch.rand(2, 3, size, size)
    write_model(path, smaller.backbone.state_dict(), model, {"image_size": size, "widths": widths})
    with torch.inference_mode():
        assert torch.equal(load_model(path).eval()(images), smaller(images))
    first = next(iter(widths))
    wrong = [{first: [10**6, 3, 1]}, {first: [1]}, {"no_layer": [1, 1]}, {first: ["1", 3, 1]}, {first: 3}, [first], {}]
    for other in wrong:
        write_model(path, load_file(path), model, {"image_size": size, "widths": other})
        with pytest.raises(ValueError, match=r"model.safetensors is damaged or was not written by this project"):
            load_model(path)
