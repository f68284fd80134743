"""A small CNN for small images, used by the demo.

Two strided convolutions and one wide linear layer: cheap enough for adversarial training on a CPU, and at 99 % sparsity
every layer still carries signal. (With three convolutions of 16, 32 and 64 channels, the first kept 8 weights and the
prune phase collapsed.)
"""

from __future__ import annotations

from torch import Tensor, nn

from pipeline.models.architectures.pooling import GridAverage

CHANNELS = (32, 64)
GRID = 7
HIDDEN = 256


class SmallCNN(nn.Module):
    """Two strided convolutions and two linear layers with batch normalisation; 0.83 M parameters for ten classes."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        first, second = CHANNELS
        self.conv1 = nn.Conv2d(3, first, kernel_size=3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(first)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(first, second, kernel_size=3, stride=2, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(second)
        self.relu2 = nn.ReLU()
        self.avgpool = GridAverage(GRID, GRID)  # the identity at 28 pixels; other sizes are averaged to this grid
        self.flatten = nn.Flatten()
        self.fc1 = nn.Linear(second * GRID * GRID, HIDDEN, bias=False)
        self.bn3 = nn.BatchNorm1d(HIDDEN)
        self.relu3 = nn.ReLU()
        self.fc2 = nn.Linear(HIDDEN, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images [n, 3, h, w] of any size -> logits [n, num_classes]."""
        features = self.relu1(self.bn1(self.conv1(images)))
        features = self.relu2(self.bn2(self.conv2(features)))
        features = self.flatten(self.avgpool(features))
        return self.fc2(self.relu3(self.bn3(self.fc1(features))))


def small_cnn(num_classes: int) -> SmallCNN:
    """A freshly initialised SmallCNN."""
    return SmallCNN(num_classes)
