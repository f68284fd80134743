"""The initial weights that the networks of this package share."""

from __future__ import annotations

from torch import nn


def he_normal(network: nn.Module) -> None:
    """Every convolution ~ N(0, 2 / (k^2 out_channels)) without bias, in place (He et al. 2015, section 2.2, fan-out).

    Linear and normalisation layers keep torch's own.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            height, width = module.kernel_size
            nn.init.normal_(module.weight, std=(2 / (height * width * module.out_channels)) ** 0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
