"""Importance scores of a network and the masks computed from them (HYDRA: Sehwag et al., NeurIPS 2020).

Every Conv2d and Linear gets one score per weight. The effective weight is weight * mask, the mask is the top-k of
|score| per layer or across all layers, and the gradient is straight-through. Masks change only in `Scores.refresh`,
once per optimizer step, however many forwards an attack takes.
"""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Decimal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from pipeline.models.network import Network
from pipeline.models.pruning.allocation import MaskRule, mask_rule
from pipeline.models.pruning.masked_weight import Masked, parametrization_of
from pipeline.models.pruning.score_init import FirstScore, scaled
from pipeline.models.pruning.topk import masks_sha256
from pipeline.recipe.methods import MaskSource

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
            tensor = _original(module)
            if id(tensor) in owner:
                raise ValueError(f"{owner[id(tensor)]} and {name} share one tensor; untie them before pruning")
            owner[id(tensor)] = name
            layers[name] = module
    return layers


def _original(layer: nn.Module) -> Tensor:
    """The weight before its mask."""
    if parametrization_of(layer) is None:
        return layer.weight  # pyright: ignore[reportReturnType]
    return layer.parametrizations["weight"].original  # pyright: ignore


class Scores:
    """The scores of one network and its mask rule; constructed by `attach`.

    The scores are parameters of the network's parametrized layers, so they move with it to its device.
    """

    def __init__(self, layers: Mapping[str, nn.Module], masked: Mapping[str, Masked], rule: MaskRule) -> None:
        self._layers = layers
        self._masked = masked
        self._rule = rule

    @classmethod
    def attach(
        cls,
        network: nn.Module,
        keep_fraction: Decimal,
        source: MaskSource = "uniform",
        init: FirstScore = scaled,
    ) -> Scores:
        """Add scores, initialised by `init`, and their mask to every maskable weight.

        `source` divides the budget among layers: the same fraction of each (the paper), ERK, global ranking of all
        scores, or global ranking with one learned rate per layer. Or scores are binary, and are the masks. Use
        `score_init.zero` if scores are loaded next.
        Errors: ValueError if there is nothing to mask or scores are already attached, and those of `init`.
        """
        layers = maskable(network)
        if not layers:
            raise ValueError("the network has no Conv2d and no Linear, so there is nothing to prune")
        if any(parametrization_of(layer) for layer in layers.values()):
            raise ValueError("the network already has scores; attach them once")
        masked: dict[str, Masked] = {}
        rule = mask_rule({name: _original(layer).shape for name, layer in layers.items()}, keep_fraction, source)
        for name, layer in layers.items():
            score = init(name, _original(layer))
            masked[name] = Masked(score, score.new_zeros(1) if source == "learned" else None)
            masked[name].train(layer.training)
            parametrize.register_parametrization(layer, "weight", masked[name])
        scores = cls(layers, masked, rule)
        scores.refresh()
        return scores

    @torch.no_grad()
    def refresh(self) -> None:
        """Recompute every mask from the current scores; call it once after each optimizer step that changes them.

        Errors: ValueError naming the weight whose scores are NaN.
        """
        scores = {name: entry.score for name, entry in self._masked.items()}
        rates = {name: entry.rate for name, entry in self._masked.items() if entry.rate is not None}
        masks = self._rule(scores, rates)
        for name, entry in self._masked.items():
            entry.mask.copy_(masks[name])

    @torch.no_grad()
    def set_masks(self, masks: Mapping[str, Tensor]) -> None:
        """Replace binary scores by `masks` (plain weight name -> bool, of the scores' shapes)."""
        for name, entry in self._masked.items():
            entry.score.copy_(masks[name])
        self.refresh()

    def weights_changed(self) -> None:
        """Invalidate cached masked weights; call it after an optimizer step. Other changes are detected."""
        for entry in self._masked.values():
            entry.weight_changed()

    def weights(self) -> dict[str, Tensor]:
        """Plain weight name -> the live weight before its mask."""
        return {name: _original(layer).detach() for name, layer in self._layers.items()}

    def masks(self) -> dict[str, Tensor]:
        """Plain weight name -> its live bool mask."""
        return {name: entry.mask for name, entry in self._masked.items()}

    @torch.no_grad()
    def first_masks(self, init: FirstScore) -> dict[str, Tensor]:
        """The masks that `attach` would compute from the current weights; scores and masks are unchanged.

        Errors: those of `init`.
        """
        scores = {name: init(name, _original(layer)) for name, layer in self._layers.items()}
        rates = {name: torch.zeros_like(entry.rate) for name, entry in self._masked.items() if entry.rate is not None}
        return self._rule(scores, rates)

    def mask_sha256(self) -> str:
        """See `topk.masks_sha256`."""
        return masks_sha256(self.masks())
