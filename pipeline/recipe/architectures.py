"""The legal values of `model.arch`. Imports no torch, since login nodes read recipes.

`pipeline.models` holds the constructors; a test keeps the two in sync. docs/recipes.md has sizes and sources.
"""

from __future__ import annotations

import difflib

OWN = (
    *("small_cnn", "cnn_small", "cnn_large"),
    *("vgg2_cifar", "vgg4_cifar", "vgg6_cifar", "vgg8_cifar", "vgg11_cifar", "vgg13_cifar", "vgg16_cifar"),
    *("vgg2_bn_cifar", "vgg4_bn_cifar", "vgg6_bn_cifar", "vgg8_bn_cifar"),
    *("vgg11_bn_cifar", "vgg13_bn_cifar", "vgg16_bn_cifar"),
    *("wrn_28_4", "wrn_28_10", "wrn_34_10"),
    *("resnet18_cifar", "resnet34_cifar", "resnet50_cifar", "resnet18_w16_cifar"),
    "ra_resnet50",
)
"""Built in `pipeline.models`."""

TORCHVISION = (
    "alexnet",
    *("convnext_base", "convnext_large", "convnext_small", "convnext_tiny"),
    *("densenet121", "densenet161", "densenet169", "densenet201"),
    *("efficientnet_b0", "efficientnet_b1", "efficientnet_b2", "efficientnet_b3"),
    *("efficientnet_b4", "efficientnet_b5", "efficientnet_b6", "efficientnet_b7"),
    *("efficientnet_v2_l", "efficientnet_v2_m", "efficientnet_v2_s"),
    *("googlenet", "inception_v3", "maxvit_t"),
    *("mnasnet0_5", "mnasnet0_75", "mnasnet1_0", "mnasnet1_3"),
    *("mobilenet_v2", "mobilenet_v3_large", "mobilenet_v3_small"),
    *("regnet_x_400mf", "regnet_x_800mf", "regnet_x_1_6gf", "regnet_x_3_2gf"),
    *("regnet_x_8gf", "regnet_x_16gf", "regnet_x_32gf"),
    *("regnet_y_400mf", "regnet_y_800mf", "regnet_y_1_6gf", "regnet_y_3_2gf"),
    *("regnet_y_8gf", "regnet_y_16gf", "regnet_y_32gf", "regnet_y_128gf"),
    *("resnet18", "resnet34", "resnet50", "resnet101", "resnet152"),
    *("resnext101_32x8d", "resnext101_64x4d", "resnext50_32x4d"),
    *("shufflenet_v2_x0_5", "shufflenet_v2_x1_0", "shufflenet_v2_x1_5", "shufflenet_v2_x2_0"),
    *("squeezenet1_0", "squeezenet1_1"),
    *("swin_b", "swin_s", "swin_t", "swin_v2_b", "swin_v2_s", "swin_v2_t"),
    *("vgg11", "vgg11_bn", "vgg13", "vgg13_bn", "vgg16", "vgg16_bn", "vgg19", "vgg19_bn"),
    *("wide_resnet101_2", "wide_resnet50_2"),
)
"""torchvision's classifiers, under its names."""

REFUSED = ("vit_b_16", "vit_b_32", "vit_h_14", "vit_l_16", "vit_l_32")
"""torchvision's classifiers that have too many weights outside Conv2d and Linear layers to be pruned."""


def known_architecture(name: str) -> str:
    """`name` itself. Errors: ValueError with the closest names, or with the reason for which this one is refused."""
    if name in REFUSED:
        raise ValueError("its attention holds a quarter of the weights in no Conv2d or Linear, so they have no scores")
    if name not in OWN + TORCHVISION:
        near = difflib.get_close_matches(name, OWN + TORCHVISION, n=3)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise ValueError(f"unknown network; {hint}docs/recipes.md lists them all")
    return name
