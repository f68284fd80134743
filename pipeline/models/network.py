"""The network of a recipe: a classifier whose first layer is the normalisation.

Images are in [0, 1] everywhere else, so that eps is in pixels and every attack, in training and in evaluation, passes
through the same normalisation.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torchvision
from torch import Tensor, nn

from pipeline.models.small_cnn import small_cnn
from pipeline.recipe_sections import Model

BACKBONES: dict[str, Callable[..., nn.Module]] = {
    "small_cnn": small_cnn,
    "resnet18": torchvision.models.resnet18,
    "resnet50": torchvision.models.resnet50,
}
"""arch of the recipe -> constructor that takes num_classes."""


class Network(nn.Module):
    """Normalisation followed by `backbone`.

    mean and std are not in the state dict: the state of a network is its backbone's, under the backbone's names.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, backbone: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.backbone = backbone
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Images [n, channels, h, w] in [0, 1] -> logits [n, num_classes]."""
        return self.backbone((images - self.mean) / self.std)


def build_network(model: Model, seed: int) -> Network:
    """The network that `model` names, freshly initialised on the CPU in float32.

    The weights are a function of `seed` alone; the caller's random state is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        backbone = BACKBONES[model.arch](num_classes=model.num_classes)
    return Network(backbone, model.mean, model.std)
