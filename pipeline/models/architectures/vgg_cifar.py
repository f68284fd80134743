"""VGG for small images, as HYDRA trains it (Simonyan & Zisserman 2015, configurations A, B and D, and shorter ones).

Convolutions without bias, features averaged to 2 x 2, three linear layers of 256, 256 and num_classes. Parameters are
named as torchvision does, `features.N` and `classifier.N`, with the reference code's indices, so that its checkpoints
load.
"""

from __future__ import annotations

from torch import Tensor, nn

from pipeline.models.architectures.initialisation import he_normal
from pipeline.models.architectures.pooling import GridAverage

WIDTHS: dict[int, tuple[tuple[int, ...], ...]] = {
    2: ((64,), (64,)),
    4: ((64, 64), (128, 128)),
    6: ((64, 64), (128, 128), (256, 256)),
    8: ((64, 64), (128, 128), (256, 256), (512, 512)),
    11: ((64,), (128,), (256, 256), (512, 512), (512, 512)),
    13: ((64, 64), (128, 128), (256, 256), (512, 512), (512, 512)),
    16: ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512)),
}
"""Depth -> convolution widths, in groups separated by max-pooling.

Up to 8, depth counts convolutions; from 11 on, it also counts the three linear layers, as Simonyan & Zisserman do.
"""
HALVINGS = 4
"""Maximum number of poolings: the deep networks have none after their last group, so that 32 pixels end as 2 x 2."""
GRID = 2
HIDDEN = 256


def _features(depth: int, batch_norm: bool) -> nn.Sequential:
    layers: list[nn.Module] = []
    channels = 3
    for index, group in enumerate(WIDTHS[depth]):
        for width in group:
            layers.append(nn.Conv2d(channels, width, kernel_size=3, padding=1, bias=False))
            if batch_norm:
                layers.append(nn.BatchNorm2d(width))
            layers.append(nn.ReLU())
            channels = width
        if index < HALVINGS:
            layers.append(nn.MaxPool2d(kernel_size=2, stride=2))
    return nn.Sequential(*layers)


class CifarVGG(nn.Module):
    """The convolutions of `WIDTHS[depth]`, with or without batch normalisation, and three linear layers."""

    def __init__(self, depth: int, batch_norm: bool, num_classes: int) -> None:
        super().__init__()
        self.features = _features(depth, batch_norm)
        self.avgpool = GridAverage(GRID, GRID)
        self.flatten = nn.Flatten()
        self.classifier = nn.Sequential(
            nn.Linear(WIDTHS[depth][-1][-1] * GRID * GRID, HIDDEN),
            nn.ReLU(),
            nn.Linear(HIDDEN, HIDDEN),
            nn.ReLU(),
            nn.Linear(HIDDEN, num_classes),
        )
        he_normal(self)
        for layer in self.classifier:
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=0.01)
                nn.init.zeros_(layer.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images [n, 3, h, w] of 16 pixels or more -> logits [n, num_classes]."""
        return self.classifier(self.flatten(self.avgpool(self.features(images))))
