"""What an image costs a network: multiply-accumulates of its convolutions and linear layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pipeline.models.pruning.maskable import backbone_of, maskable


@dataclass(frozen=True)
class Cost:
    """Of convolutions and linear layers; biases, normalisation and pooling are not counted."""

    parameters: int
    kept_parameters: int
    """Weights that are not zero."""
    multiply_accumulates: int
    """For one image: each weight times the positions at which it is applied, zeros included."""
    kept_multiply_accumulates: int
    """Those whose weight is not zero."""

    @classmethod
    def of_layers(cls, layers: Iterable[tuple[int, int, int]]) -> Cost:
        """From (weights, weights that are not zero, positions) of each layer."""
        rows = list(layers)
        return cls(
            parameters=sum(size for size, _, _ in rows),
            kept_parameters=sum(kept for _, kept, _ in rows),
            multiply_accumulates=sum(size * positions for size, _, positions in rows),
            kept_multiply_accumulates=sum(kept * positions for _, kept, positions in rows),
        )


def network_cost(network: nn.Module, image_size: int) -> Cost:
    """For images of `image_size` pixels; see `multiply_accumulates`."""
    counts, rows = multiply_accumulates(network, image_size), []
    for name, layer in maskable(network).items():
        assert isinstance(layer.weight, Tensor)
        size, kept = layer.weight.numel(), int(layer.weight.count_nonzero())
        rows.append((size, kept, counts.get(name.removesuffix(".weight"), 0) // size))
    return Cost.of_layers(rows)


def multiply_accumulates(network: nn.Module, image_size: int) -> dict[str, int]:
    """Plain name of each convolution and linear layer ("layer1.0.conv1") -> its multiply-accumulates for one image.

    The layer's weights times the positions at which they are applied; pruned connections count. In order of execution;
    a layer that is used twice counts twice. The network runs once on a black image of `image_size` pixels, on its
    device and in eval mode, and is left as it was. Errors: the network's own for a size that it cannot take.
    """
    counts: dict[str, int] = {}

    def count_calls(name: str) -> Callable[[nn.Module, object, Tensor], None]:
        def hook(layer: nn.Module, _: object, output: Tensor) -> None:
            assert isinstance(layer.weight, Tensor)
            positions = math.prod(output.shape[2:] if output.dim() == 4 else output.shape[1:-1])
            counts[name] = counts.get(name, 0) + layer.weight.numel() * positions

        return hook

    hooks = [
        layer.register_forward_hook(count_calls(name))
        for name, layer in backbone_of(network).named_modules()
        if isinstance(layer, (nn.Conv2d, nn.Linear))
    ]
    modes = {module: module.training for module in network.modules()}
    try:
        network.eval()
        with torch.no_grad():
            network(torch.zeros(1, 3, image_size, image_size, device=next(network.parameters()).device))
    finally:
        for module, mode in modes.items():
            module.training = mode
        for handle in hooks:
            handle.remove()
    return counts
