"""RaResNet-50: ResNet-50 rebuilt for robustness at equal parameters (Peng et al., BMVC 2023, arXiv 2308.16258).

Differences from ResNet-50: a wider convolutional stem that downsamples by 2 and has no max-pooling, so that detail
survives longer; depths 5-8-13-1 with matching widths; bottlenecks with two groups and no normalisation before the 3 x 3
convolution; squeeze-and-excitation; the smooth activation SiLU. On ImageNet at Linf 4/255 the authors report 70.17 %
clean and 44.14 % AutoAttack accuracy, against 64.02 % and 34.96 % for Salman et al. 2020 with ResNet-50, at 1.5 times
the FLOPs. Parameters keep the names of the authors' code, so that their checkpoint loads.
"""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor, nn

from pipeline.models.architectures.initialisation import he_normal

STEM = 96
DEPTHS = (5, 8, 13, 1)
WIDTHS = (288, 576, 1120, 2160)
GROUPS = 2


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, groups=groups, bias=False)


class Bottleneck(nn.Module):
    """1 x 1, grouped 3 x 3, squeeze-and-excitation, 1 x 1; added to the shortcut, then activated."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        inner = outputs // 4
        projects = stride != 1 or inputs != outputs
        self.proj = nn.Sequential(_conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs)) if projects else None
        from torchvision.ops import SqueezeExcitation

        squeeze = SqueezeExcitation(inner, round(inputs / 4))
        self.F = nn.Sequential(
            OrderedDict(
                a=nn.Sequential(_conv(inputs, inner, 1), nn.SiLU()),
                b=nn.Sequential(_conv(inner, inner, 3, stride, GROUPS), nn.BatchNorm2d(inner), nn.SiLU()),
                se=squeeze,
                c=nn.Sequential(_conv(inner, outputs, 1), nn.BatchNorm2d(outputs)),
            )
        )
        self.last_activation = nn.SiLU()

    def forward(self, features: Tensor) -> Tensor:
        shortcut = features if self.proj is None else self.proj(features)
        return self.last_activation(shortcut + self.F(features))


class Stem(nn.Module):
    """7 x 7 convolution of stride 2, with the authors' module names."""

    def __init__(self) -> None:
        super().__init__()
        first = nn.Sequential(_conv(3, STEM, 7, stride=2), nn.BatchNorm2d(STEM), nn.ReLU())
        self.stem = nn.Sequential(OrderedDict(stem=first))

    def forward(self, images: Tensor) -> Tensor:
        return self.stem(images)


def _stage(number: int, inputs: int, outputs: int, depth: int) -> nn.Sequential:
    blocks = [Bottleneck(inputs, outputs, stride=2)]
    blocks += [Bottleneck(outputs, outputs, stride=1) for _ in range(depth - 1)]
    return nn.Sequential(OrderedDict((f"stage{number}-block{i}", block) for i, block in enumerate(blocks)))


class RaResNet50(nn.Module):
    """26.1 M parameters for 1000 classes."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.stem = Stem()
        inputs = (STEM, *WIDTHS)
        stages = [_stage(i + 1, inputs[i], WIDTHS[i], depth) for i, depth in enumerate(DEPTHS)]
        self.stages = nn.Sequential(OrderedDict((f"stage{i + 1}", stage) for i, stage in enumerate(stages)))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(WIDTHS[-1], num_classes)
        he_normal(self)
        nn.init.normal_(self.fc.weight, std=0.01)
        nn.init.zeros_(self.fc.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images [n, 3, h, w] -> logits [n, num_classes]."""
        return self.fc(self.flatten(self.avgpool(self.stages(self.stem(images)))))
