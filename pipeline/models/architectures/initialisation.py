"""Weight initialisation shared by the architectures of this package."""

from __future__ import annotations

from torch import nn


def he_normal(network: nn.Module) -> None:
    """Initialise convolutions in place: weights ~ N(0, 2 / (k^2 out_channels)), bias 0 (He et al. 2015, fan-out).

    Linear and normalisation layers keep torch's default initialisation.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            height, width = module.kernel_size
            nn.init.normal_(module.weight, std=(2 / (height * width * module.out_channels)) ** 0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
