"""Wide residual networks for small images (Zagoruyko & Komodakis 2016, WRN-depth-width, basic blocks, no dropout).

Pre-activation blocks, as in their table 1. Names are those of the PyTorch code that TRADES, HYDRA and RobustBench share
(`block1.layer.0.conv1`, `convShortcut`), so that checkpoints load in both directions; `sub_block1`, which their forward
pass never uses, is omitted.
"""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor, nn

from pipeline.models.architectures.initialisation import he_normal


class Block(nn.Module):
    """Two 3 x 3 convolutions, each after normalisation and ReLU, added to the shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.relu1 = nn.ReLU()
        self.conv1 = nn.Conv2d(inputs, outputs, kernel_size=3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu2 = nn.ReLU()
        self.conv2 = nn.Conv2d(outputs, outputs, kernel_size=3, padding=1, bias=False)
        projects = inputs != outputs
        self.convShortcut = nn.Conv2d(inputs, outputs, kernel_size=1, stride=stride, bias=False) if projects else None

    def forward(self, features: Tensor) -> Tensor:
        activated = self.relu1(self.bn1(features))
        residual = self.conv2(self.relu2(self.bn2(self.conv1(activated))))
        return (features if self.convShortcut is None else self.convShortcut(activated)) + residual


def _group(blocks: int, inputs: int, outputs: int, stride: int) -> nn.Sequential:
    first = Block(inputs, outputs, stride)
    rest = (Block(outputs, outputs, stride=1) for _ in range(blocks - 1))
    return nn.Sequential(OrderedDict(layer=nn.Sequential(first, *rest)))


class WideResNet(nn.Module):
    """WRN-depth-width; depth is 6n + 4."""

    def __init__(self, depth: int, width: int, num_classes: int) -> None:
        super().__init__()
        blocks, rest = divmod(depth - 4, 6)
        assert rest == 0, f"depth {depth} is not 6n + 4"
        self.conv1 = nn.Conv2d(3, 16, kernel_size=3, padding=1, bias=False)
        self.block1 = _group(blocks, 16, 16 * width, stride=1)
        self.block2 = _group(blocks, 16 * width, 32 * width, stride=2)
        self.block3 = _group(blocks, 32 * width, 64 * width, stride=2)
        self.bn1 = nn.BatchNorm2d(64 * width)
        self.relu = nn.ReLU()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(64 * width, num_classes)
        he_normal(self)
        nn.init.zeros_(self.fc.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images [n, 3, h, w] of any size -> logits [n, num_classes]."""
        features = self.block3(self.block2(self.block1(self.conv1(images))))
        return self.fc(self.flatten(self.avgpool(self.relu(self.bn1(features)))))
