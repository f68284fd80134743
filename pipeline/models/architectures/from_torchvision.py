"""torchvision's classifiers, and its ResNets adapted to small images.

Weights keep torchvision's names, so a plain torchvision model loads them. Training differs in two ways, neither of
which shows in the state dict: dropout and stochastic depth are off, because they draw from an RNG state that
checkpoints do not save, and pooling to more than one cell is `GridAverage`, because torch's adaptive pooling has no
deterministic backward on a GPU.
"""

from __future__ import annotations

from typing import Any, cast

from torch import nn

from pipeline.models.architectures.pooling import GridAverage

WITH_AUXILIARY_LOGITS = ("googlenet", "inception_v3")
"""Return three tensors in training mode unless `aux_logits` is off."""


def _classifier(name: str, num_classes: int, **options: Any) -> nn.Module:
    import torchvision  # takes as long as torch itself, and most processes build no such network

    return torchvision.models.get_model(name, num_classes=num_classes, **options)


def _make_deterministic(network: nn.Module) -> None:
    from torchvision.ops import StochasticDepth

    for module in network.modules():
        if isinstance(module, (nn.Dropout, StochasticDepth)):
            module.p = 0.0
        for name, child in module.named_children():
            if isinstance(child, nn.AdaptiveAvgPool2d) and child.output_size not in (1, (1, 1)):
                rows, columns = cast(tuple[int, int], child.output_size)
                setattr(module, name, GridAverage(rows, columns))


def torchvision_classifier(name: str, num_classes: int) -> nn.Module:
    """torchvision's classifier `name`, freshly initialised."""
    options: dict[str, Any] = {}
    if name in WITH_AUXILIARY_LOGITS:
        options = {"aux_logits": False, "init_weights": True}
    network = _classifier(name, num_classes, **options)
    _make_deterministic(network)
    return network


def cifar_resnet(name: str, num_classes: int) -> nn.Module:
    """torchvision's ResNet `name` with a 3 x 3 stem of stride 1 and no max-pooling: 32-pixel images end as 4 x 4.

    The stem follows He et al. 2016 (section 4.2, CIFAR); combined with ImageNet's four stages, it is what the
    robustness literature, HYDRA's reference code and RobustBench call ResNet-18, 34 and 50 on CIFAR.
    """
    network: Any = _classifier(name, num_classes)
    network.conv1 = nn.Conv2d(3, 64, kernel_size=3, padding=1, bias=False)
    _initialise(network.conv1)
    network.maxpool = nn.Identity()
    return network


def narrow_cifar_resnet18(width: int, num_classes: int) -> nn.Module:
    """`cifar_resnet` 18 with stages of width, 2, 4 and 8 x width channels instead of 64 to 512."""
    from torchvision.models.resnet import BasicBlock

    network: Any = cifar_resnet("resnet18", num_classes)
    network.inplanes = width
    network.conv1 = nn.Conv2d(3, width, kernel_size=3, padding=1, bias=False)
    network.bn1 = nn.BatchNorm2d(width)
    for index, stride in enumerate((1, 2, 2, 2)):
        stage = network._make_layer(BasicBlock, width * 2**index, blocks=2, stride=stride)
        setattr(network, f"layer{index + 1}", stage)
    network.fc = nn.Linear(8 * width, num_classes)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            _initialise(module)
    return network


def _initialise(conv: nn.Conv2d) -> None:
    """As torchvision's ResNets."""
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
