"""A small CNN for small images: the demo's network.

Two strided convolutions and one wide linear layer: a CPU can afford adversarial training of it, and at 99 % pruned no
layer is too thin to carry signal. (With three convolutions of 16, 32 and 64 channels the first kept 8 weights, and the
prune phase collapsed.)
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CHANNELS = (32, 64)
GRID = 7
HIDDEN = 256


def grid_average(features: Tensor) -> Tensor:
    """Adaptive average pooling to GRID x GRID: [n, c, h, w] -> [n, c, GRID, GRID], so that any image size fits.

    As two matrix products, because the backward pass of torch's own pooling is not deterministic on a GPU. At 28
    pixels the grid is what the convolutions leave, and nothing is done.
    """
    if features.shape[-2:] == (GRID, GRID):
        return features
    rows, columns = (F.adaptive_avg_pool1d(torch.eye(size), GRID).to(features) for size in features.shape[-2:])
    return rows.T @ features @ columns


class SmallCNN(nn.Module):
    """Two strided convolutions and two linear layers with batch normalisation; 0.83 M parameters for ten classes."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        first, second = CHANNELS
        self.conv1 = nn.Conv2d(3, first, kernel_size=3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(first)
        self.conv2 = nn.Conv2d(first, second, kernel_size=3, stride=2, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(second)
        self.fc1 = nn.Linear(second * GRID * GRID, HIDDEN, bias=False)
        self.bn3 = nn.BatchNorm1d(HIDDEN)
        self.fc2 = nn.Linear(HIDDEN, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images [n, 3, h, w] of any size -> logits [n, num_classes]."""
        features = self.bn1(self.conv1(images)).relu()
        features = self.bn2(self.conv2(features)).relu()
        features = grid_average(features).flatten(1)
        return self.fc2(self.bn3(self.fc1(features)).relu())


def small_cnn(num_classes: int) -> SmallCNN:
    """A freshly initialised SmallCNN."""
    return SmallCNN(num_classes)
