"""A network under torch.compile, for the updates and attacks of a phase."""

from __future__ import annotations

import torch
import torch._dynamo
from torch import Tensor, nn
from torch.nn.utils import parametrize

from pipeline.models.pruning.masked_weight import masked_layers

MOST_VERSIONS = 64
"""Most compilations of one network: one for the update and one for the attack, per image size."""


class Compiled(nn.Module):
    """`network` with a compiled forward, compiled at its first call per kind and image shape; same parameters.

    Masked weights are computed before, once per forward or once per attack (`cached_weights`), and are inputs of the
    compiled graph, so masks may change. Objectives that compute bounds need the network's layers, and cannot use this.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self._masked_layers = masked_layers(network)
        torch._dynamo.config.recompile_limit = MOST_VERSIONS
        torch._dynamo.config.fail_on_recompile_limit_hit = True  # instead of falling back to eager

        def forward(images: Tensor) -> Tensor:
            return network(images)

        self._forward = torch.compile(forward, dynamic=False)

    def forward(self, images: Tensor) -> Tensor:
        """Images [n, channels, h, w] in [0, 1] -> logits [n, num_classes]."""
        with parametrize.cached():
            for layer in self._masked_layers:
                _ = layer.weight  # fills the cache, with a graph unless an attack has filled it
            return self._forward(images)

    def close(self) -> None:
        """Drop all compiled code of the process, which holds references to its networks."""
        torch._dynamo.reset()
