"""Builds a recipe's network: a classifier whose first layer is the normalisation.

Images are in [0, 1] everywhere else, so that eps is in pixel units and every attack, in training and in evaluation,
goes through the same normalisation.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from pipeline.models.architectures.from_torchvision import cifar_resnet, narrow_cifar_resnet18, torchvision_classifier
from pipeline.models.architectures.ra_resnet import RaResNet50
from pipeline.models.architectures.small_cnn import small_cnn
from pipeline.models.architectures.verified_cnn import cnn_large, cnn_small
from pipeline.models.architectures.vgg_cifar import WIDTHS, CifarVGG
from pipeline.models.architectures.wide_resnet import WideResNet
from pipeline.recipe.architectures import TORCHVISION
from pipeline.recipe.sections import Model

BACKBONES: dict[str, Callable[[int], nn.Module]] = {
    "small_cnn": small_cnn,
    **{f"vgg{depth}_cifar": functools.partial(CifarVGG, depth, False) for depth in WIDTHS},
    **{f"vgg{depth}_bn_cifar": functools.partial(CifarVGG, depth, True) for depth in WIDTHS},
    "wrn_28_4": functools.partial(WideResNet, 28, 4),
    "wrn_28_10": functools.partial(WideResNet, 28, 10),
    "wrn_34_10": functools.partial(WideResNet, 34, 10),
    **{f"{name}_cifar": functools.partial(cifar_resnet, name) for name in ("resnet18", "resnet34", "resnet50")},
    "resnet18_w16_cifar": functools.partial(narrow_cifar_resnet18, 16),
    "ra_resnet50": RaResNet50,
    **{name: functools.partial(torchvision_classifier, name) for name in TORCHVISION},
}
"""model.arch -> constructor that takes num_classes."""

BACKBONES_OF_ONE_SIZE: dict[str, Callable[[int, int], nn.Module]] = {"cnn_small": cnn_small, "cnn_large": cnn_large}
"""model.arch -> constructor that takes num_classes and image_size."""


class Network(nn.Module):
    """Normalisation followed by `backbone`.

    mean and std are not in the state dict: the state of a network is that of its backbone, under the backbone's names.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, backbone: nn.Module, mean: tuple[float, ...], std: tuple[float, ...], image_size: int | None = None
    ) -> None:
        super().__init__()
        self.image_size = image_size
        """Height and width of its images, in pixels; None if it is not known."""
        self.backbone = backbone
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Images [n, channels, h, w] in [0, 1] -> logits [n, num_classes]."""
        return self.backbone((images - self.mean) / self.std)


def build_network(model: Model, seed: int, image_size: int | None = None) -> Network:
    """The network that `model` names, freshly initialised on the CPU in float32.

    The weights depend on `seed` alone; the caller's random state is unchanged. With `image_size` (pixels), the network
    is checked to take images of that size.
    Errors: ValueError for an image size that the network cannot take, or if the architecture needs one and it is None.
    """
    if image_size is None and model.arch in BACKBONES_OF_ONE_SIZE:
        raise ValueError(f"{model.arch} is built for images of one size; give image_size")
    if image_size is not None:
        check_size(model, image_size, image_size, "data.image_size")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        backbone = _build_backbone(model.arch, model.num_classes, image_size)
    return Network(backbone, model.mean, model.std, image_size)


def _build_backbone(arch: str, num_classes: int, image_size: int | None) -> nn.Module:
    if arch in BACKBONES_OF_ONE_SIZE:
        assert image_size is not None
        return BACKBONES_OF_ONE_SIZE[arch](num_classes, image_size)
    return BACKBONES[arch](num_classes)


def head_names(network: Network, model: Model, image_size: int | None) -> frozenset[str]:
    """Names of the backbone's tensors whose shapes depend on the number of classes: those of the last layer.

    `network` is that of `build_network`; `image_size` as there. Errors: ValueError if it is needed and None.
    """
    if image_size is None and model.arch in BACKBONES_OF_ONE_SIZE:
        raise ValueError(f"{model.arch} is built for images of one size; give image_size")
    with torch.random.fork_rng(devices=[]):
        other = _build_backbone(model.arch, model.num_classes + 1, image_size).state_dict()
    own = network.backbone.state_dict().items()
    return frozenset(name for name, tensor in own if other[name].shape != tensor.shape)


def check_size(model: Model, built_for: int, image_size: int, key: str) -> None:
    """Check that the network of `model`, built for images of `built_for` pixels, takes images of `image_size` pixels.

    `key` is the recipe key that sets the size.
    Errors: ValueError if a layer rejects it, which otherwise surfaces at the first training step.
    """
    if (reason := _shape_problem(model.arch, model.num_classes, built_for, image_size)) is not None:
        raise ValueError(
            f"model.arch {model.arch} cannot take images of {key} {image_size} ({reason}); change one of them"
        )


def check_micro_batch(model: Model, built_for: int, image_size: int, images: int) -> None:
    """Check that training with micro-batches of `images` images gives every BatchNorm layer several values per channel.

    Errors: ValueError if one sees a single value: that of one image, of one pixel.
    """
    if images > 1:
        return
    if (reason := _shape_problem(model.arch, model.num_classes, built_for, image_size, training=True)) is not None:
        raise ValueError(
            f"batch.micro_batch {images}: the BatchNorm of model.arch {model.arch} cannot train on one image of "
            f"{image_size} pixels ({reason}); set batch.micro_batch=2 or more"
        )


@functools.cache
def _shape_problem(arch: str, num_classes: int, built_for: int, image_size: int, training: bool = False) -> str | None:
    """Why the network rejects one such image, by the shapes alone; every stage asks, and it takes as long as a step."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        backbone = _build_backbone(arch, num_classes, built_for).train(training).to("meta")
        try:
            backbone(torch.empty(1, 3, image_size, image_size, device="meta"))
        except (RuntimeError, ValueError, AssertionError) as error:
            return " ".join(str(error).split())
    return None
