"""Importance scores of a network and the masks computed from them (HYDRA: Sehwag et al., NeurIPS 2020).

Every Conv2d and Linear gets one score per weight. The effective weight is weight * mask, the mask is the top-k of
|score| per layer or across all layers, of connections or of a structure's units, and the gradient is straight-through.
Masks change only in `Scores.refresh`, once per optimizer step, however many forwards an attack takes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from decimal import Decimal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from pipeline.models.network import Network
from pipeline.models.pruning.allocation import MaskRule, binary_masks, total_kept
from pipeline.models.pruning.channel_structure import CoupledChannels
from pipeline.models.pruning.channels import find_channels
from pipeline.models.pruning.harp import BudgetPenalty, first_k, floor_of
from pipeline.models.pruning.maskable import maskable, original_weight
from pipeline.models.pruning.masked_weight import Masked, parametrization_of
from pipeline.models.pruning.score_init import FirstScore, scaled
from pipeline.models.pruning.structure import Structure, build_structure
from pipeline.models.pruning.topk import masks_sha256
from pipeline.recipe.methods import LEARNED, MaskSource
from pipeline.recipe.methods import Structure as StructureName


def structure_of(network: nn.Module, name: StructureName, round_to: int = 1) -> Structure:
    """The structure `name` on the layers of a network, which has no scores yet and, for channels, an image_size."""
    shapes = {weight: original_weight(layer).shape for weight, layer in maskable(network).items()}
    if name != "channel":
        return build_structure(name, shapes)
    size = network.image_size if isinstance(network, Network) else None
    assert size is not None, "build_network with image_size"
    return CoupledChannels(shapes, find_channels(network, size), round_to)


def check_structures(
    network: nn.Module, structures: Iterable[StructureName], keep_fractions: Iterable[Decimal] = (), round_to: int = 1
) -> None:
    """Errors: ValueError naming a structure that no layer of the network has, or a keep_fraction below the smallest
    network that it leaves."""
    for name in structures:
        structure = structure_of(network, name, round_to)
        if not structure.shapes:
            raise ValueError(
                f"sparsity: structure {name} divides no Conv2d and no Linear of the network; use a smaller one or "
                "unstructured"
            )
        for keep in keep_fractions:
            structure.check_budget(keep)


def _first_rates(
    scores: Mapping[str, Tensor], keep_fraction: Decimal, source: MaskSource, structure: Structure
) -> dict[str, Tensor]:
    """Plain weight name -> rate [1], of the layers whose share is learned."""
    if source not in LEARNED:
        return {}
    first = first_k(keep_fraction) if source == "harp" else 0.0
    return {name: score.new_full((1,), first) for name, score in scores.items() if name in structure.shapes}


class Scores:
    """The scores of one network and its mask rule; constructed by `attach`.

    The scores are parameters of the network's parametrized layers, so they move with it to its device.
    """

    def __init__(
        self,
        layers: Mapping[str, nn.Module],
        masked: Mapping[str, Masked],
        keep_fraction: Decimal,
        source: MaskSource,
        structure: Structure,
    ) -> None:
        self._layers = layers
        self._masked = masked
        self._keep_fraction = keep_fraction
        self.source: MaskSource = source
        self.structure = structure
        self._exact: MaskRule = binary_masks if source == "binary" else self.structure.mask_rule(keep_fraction, source)
        self._rule = self._exact

    @classmethod
    def attach(
        cls,
        network: nn.Module,
        keep_fraction: Decimal,
        source: MaskSource = "uniform",
        init: FirstScore = scaled,
        structure: StructureName = "unstructured",
        round_to: int = 1,
    ) -> Scores:
        """Add scores, initialised by `init`, and their mask to every maskable weight.

        `source` divides the budget among layers: the same fraction of each (the paper), ERK, global ranking of all
        scores, global ranking with one learned rate per layer, or HARP's learned shares. Or scores are binary, and are
        the masks. `structure` says which connections are kept or pruned together; `round_to` is of channels. Use
        `score_init.zero` if scores are loaded next.
        Errors: ValueError if there is nothing to mask or scores are already attached, and those of `init`.
        """
        layers = maskable(network)
        if not layers:
            raise ValueError("the network has no Conv2d and no Linear, so there is nothing to prune")
        if any(parametrization_of(layer) for layer in layers.values()):
            raise ValueError("the network already has scores; attach them once")
        own_structure = structure_of(network, structure, round_to)
        masked: dict[str, Masked] = {}
        floor = floor_of(keep_fraction) if source == "harp" else None
        for name, layer in layers.items():
            score = init(name, original_weight(layer))
            rates = _first_rates({name: score}, keep_fraction, source, own_structure)
            masked[name] = Masked(score, rates.get(name), floor)
            masked[name].train(layer.training)
            parametrize.register_parametrization(layer, "weight", masked[name])
        scores = cls(layers, masked, keep_fraction, source, own_structure)
        scores.refresh()
        return scores

    @torch.no_grad()
    def refresh(self) -> None:
        """Recompute every mask from the current scores; call it once after each optimizer step that changes them.

        Errors: ValueError naming the weight whose scores are NaN.
        """
        masks = self._rule(self.parameters(), self._rates())
        for name, entry in self._masked.items():
            entry.mask.copy_(masks[name])

    def parameters(self) -> dict[str, nn.Parameter]:
        """Plain weight name -> its live scores."""
        return {name: entry.score for name, entry in self._masked.items()}

    def _rates(self) -> dict[str, nn.Parameter]:
        return {name: entry.rate for name, entry in self._masked.items() if entry.rate is not None}

    def follow_shares(self) -> BudgetPenalty | None:
        """For a phase that trains scores: from the next refresh on, removed channels are not read, but computed, and
        HARP's masks have the layers' shares, whatever their total; the penalty draws it to the budget. None with other
        allocations, whose total is always exact."""
        if self.source != "binary" and isinstance(self.structure, CoupledChannels):
            self._rule = self.structure.mask_rule(self._keep_fraction, self.source, exact=False)
        if self.source != "harp":
            return None
        units = self.structure.unit_shapes
        floor, budget = floor_of(self._keep_fraction), total_kept(units, self._keep_fraction)
        self._rule = self.structure.mask_rule(self._keep_fraction, self.source, exact=False)
        return BudgetPenalty(self._rates(), {name: shape.numel() for name, shape in units.items()}, budget, floor)

    def keep_budget(self) -> None:
        """From the next refresh on, masks keep the budget exactly, as at first."""
        self._rule = self._exact

    @contextmanager
    def within_budget(self) -> Iterator[None]:
        """Masks that keep the budget exactly, as in the network that the phase results in."""
        rule = self._rule
        if rule is self._exact:
            yield
            return
        self.keep_budget()
        self.refresh()
        try:
            yield
        finally:
            self._rule = rule
            self.refresh()

    @torch.no_grad()
    def shift(self, changes: Mapping[str, Tensor]) -> Callable[[], None]:
        """Add to the scores in place and recompute the masks; returns what restores both, bit for bit.

        A backward through the shifted scores must come before. Errors: as `refresh`.
        """
        before = [(entry, entry.score.clone(), entry.mask.clone()) for entry in self._masked.values()]
        for name, entry in self._masked.items():
            entry.score.add_(changes[name])
        self.refresh()

        @torch.no_grad()
        def restore() -> None:
            for entry, score, mask in before:
                entry.score.copy_(score)
                entry.mask.copy_(mask)

        return restore

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
        return {name: original_weight(layer).detach() for name, layer in self._layers.items()}

    def masks(self) -> dict[str, Tensor]:
        """Plain weight name -> its live bool mask."""
        return {name: entry.mask for name, entry in self._masked.items()}

    @torch.no_grad()
    def first_masks(self, init: FirstScore) -> dict[str, Tensor]:
        """The masks that `attach` would compute from the current weights; scores and masks are unchanged.

        Errors: those of `init`.
        """
        scores = {name: init(name, original_weight(layer)) for name, layer in self._layers.items()}
        return self._rule(scores, _first_rates(scores, self._keep_fraction, self.source, self.structure))

    def mask_sha256(self) -> str:
        """See `topk.masks_sha256`."""
        return masks_sha256(self.masks())
