"""The layers of a network that have scores and masks, by the plain names of their weights."""

from __future__ import annotations

from torch import Tensor, nn

from pipeline.models.network import Network
from pipeline.models.pruning.masked_weight import parametrization_of

MASKABLE = (nn.Conv2d, nn.Linear)


def backbone_of(network: nn.Module) -> nn.Module:
    """The module whose parameter names are the plain names."""
    return network.backbone if isinstance(network, Network) else network


def maskable(network: nn.Module) -> dict[str, nn.Module]:
    """Plain weight name -> layer, for every Conv2d and Linear; a layer registered under two names appears once.

    Errors: ValueError if two layers share one weight tensor, which can have only one mask.
    """
    layers: dict[str, nn.Module] = {}
    owner: dict[int, str] = {}
    for prefix, module in backbone_of(network).named_modules():
        if isinstance(module, MASKABLE):
            name = f"{prefix}.weight" if prefix else "weight"
            tensor = original_weight(module)
            if id(tensor) in owner:
                raise ValueError(f"{owner[id(tensor)]} and {name} share one tensor; untie them before pruning")
            owner[id(tensor)] = name
            layers[name] = module
    return layers


def original_weight(layer: nn.Module) -> Tensor:
    """The weight before its mask."""
    if parametrization_of(layer) is None:
        return layer.weight  # pyright: ignore[reportReturnType]
    return layer.parametrizations["weight"].original  # pyright: ignore
