"""The two plain CNNs of the verification literature: convolution, linear, ReLU and flatten only.

Layers and initialisation are those of the small and the large network of Wong et al. 2018 (arXiv 1805.12514, and their
code), for 28 pixels (MNIST, there with one channel) and 32 (CIFAR); HYDRA trains both with MixTrain and CROWN-IBP. The
flattened width depends on the image size, so a network takes only images of the size it was built for. Parameters are
named by their index in an nn.Sequential, as in published checkpoints.
"""

from __future__ import annotations

from torch import nn

from pipeline.models.architectures.initialisation import he_normal


def _flat_width(channels: int, image_size: int) -> int:
    """Width after two convolutions of kernel 4, stride 2, padding 1, each of which halves the side (rounded down)."""
    return channels * (image_size // 4) ** 2


def cnn_small(num_classes: int, image_size: int) -> nn.Sequential:
    """Two convolutions and two linear layers: 0.21 M parameters at 32 pixels and ten classes."""
    network = nn.Sequential(
        nn.Conv2d(3, 16, kernel_size=4, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, kernel_size=4, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(_flat_width(32, image_size), 100),
        nn.ReLU(),
        nn.Linear(100, num_classes),
    )
    he_normal(network)
    return network


def cnn_large(num_classes: int, image_size: int) -> nn.Sequential:
    """Four convolutions and three linear layers: 2.47 M parameters at 32 pixels and ten classes."""
    network = nn.Sequential(
        nn.Conv2d(3, 32, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 32, kernel_size=4, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 64, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.Conv2d(64, 64, kernel_size=4, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(_flat_width(64, image_size), 512),
        nn.ReLU(),
        nn.Linear(512, 512),
        nn.ReLU(),
        nn.Linear(512, num_classes),
    )
    he_normal(network)
    return network
