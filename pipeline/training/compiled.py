"""A network as torch.compile makes it, for the steps of a phase: updates and attacks."""

from __future__ import annotations

import torch
import torch._dynamo
from torch import Tensor, nn
from torch.nn.utils import parametrize

from pipeline.models.pruning.masked_weight import masked_layers

MOST_VERSIONS = 64
"""How often one network may be compiled: for the update, for the attack, and that for each size of its images."""


class Compiled(nn.Module):
    """`network`, whose forward is compiled at its first call of a kind and for its shape of images; same parameters.

    Masked weights are made before, once per forward, or once per attack (`masked.cached_weights`), and are inputs of
    what is compiled: their masks may change. A network that its objective looks into (bounds) cannot be compiled.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self._masked_layers = masked_layers(network)
        torch._dynamo.config.recompile_limit = MOST_VERSIONS
        torch._dynamo.config.fail_on_recompile_limit_hit = True  # instead of going on as if not compiled

        def forward(images: Tensor) -> Tensor:
            return network(images)

        self._forward = torch.compile(forward, dynamic=False)

    def forward(self, images: Tensor) -> Tensor:
        """Images [n, channels, h, w] in [0, 1] -> logits [n, num_classes]."""
        with parametrize.cached():
            for layer in self._masked_layers:
                _ = layer.weight  # into the cache, with its graph unless an attack's is there
            return self._forward(images)

    def close(self) -> None:
        """Forget what was compiled, in the whole process, and with it the networks that it was compiled from."""
        torch._dynamo.reset()
