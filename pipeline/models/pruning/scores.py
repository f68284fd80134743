"""Importance scores and the masks that they make (HYDRA: Sehwag et al., NeurIPS 2020).

Every Conv2d and Linear gets one score per weight. The effective weight is weight * mask, the mask is the top-k of
|score| in its layer or among all layers, and the gradient passes straight through the ranking. Masks change only in
`refresh_masks`, once per optimizer step, however many forwards an attack takes.

Plain names are the backbone's own ('layer1.0.conv1.weight'), with and without scores, whatever wraps it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from decimal import Decimal
from typing import Any, Literal, TypedDict

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize

from pipeline.models.network import Network
from pipeline.models.pruning.allocation import Deal, deal_of
from pipeline.models.pruning.masked_weight import Masked
from pipeline.models.pruning.score_init import FirstScore, scaled
from pipeline.recipe.sections import Allocation, BatchNormMode

MASKABLE = (nn.Conv2d, nn.Linear)
NORMALISATION = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)

_ORIGINAL = "parametrizations.weight.original"
_SCORE = "parametrizations.weight.0.score"
_RATE = "parametrizations.weight.0.rate"
_DEAL = "_deal"
"""Attribute of the backbone: the Deal that makes all its masks."""


class LayerCount(TypedDict):
    """Kept and all connections of one masked weight."""

    name: str
    kept: int
    total: int


def _root(network: nn.Module) -> nn.Module:
    return network.backbone if isinstance(network, Network) else network


def maskable(network: nn.Module) -> dict[str, nn.Module]:
    """Plain weight name -> layer, for every Conv2d and Linear; a layer that is used twice appears once.

    Errors: ValueError when two layers share one weight tensor, which can have only one mask.
    """
    layers: dict[str, nn.Module] = {}
    owner: dict[int, str] = {}
    for prefix, module in _root(network).named_modules():
        if isinstance(module, MASKABLE):
            name = f"{prefix}.weight" if prefix else "weight"
            tensor = _original(module)
            if id(tensor) in owner:
                raise ValueError(f"{owner[id(tensor)]} and {name} share one tensor; untie them before pruning")
            owner[id(tensor)] = name
            layers[name] = module
    return layers


def _parametrization(layer: nn.Module) -> Masked | None:
    if not parametrize.is_parametrized(layer, "weight"):
        return None
    first = layer.parametrizations["weight"][0]  # pyright: ignore[reportIndexIssue, reportCallIssue, reportArgumentType]
    return first if isinstance(first, Masked) else None


def _original(layer: nn.Module) -> Tensor:
    if _parametrization(layer) is None:
        return layer.weight  # pyright: ignore[reportReturnType]
    return layer.parametrizations["weight"].original  # pyright: ignore


def _masked(network: nn.Module) -> dict[str, Masked]:
    found = {name: _parametrization(layer) for name, layer in maskable(network).items()}
    return {name: masked for name, masked in found.items() if masked is not None}


def masked_layers(network: nn.Module) -> list[nn.Module]:
    """The layers whose weight is masked, so that reading `layer.weight` makes it."""
    return [layer for layer in maskable(network).values() if _parametrization(layer)]


def has_scores(network: nn.Module) -> bool:
    """Whether `attach_scores` was called on this network."""
    return bool(_masked(network))


def attach_scores(
    network: nn.Module, keep_fraction: Decimal, allocation: Allocation = "uniform", first: FirstScore = scaled
) -> None:
    """Give every maskable weight its scores, as `first` says, and the mask that they make.

    `allocation` deals the connections to layers: the same fraction of each (the paper), ERK, by rank among the scores
    of all layers, or by that rank with one rate per layer that learns along. Errors: ValueError when there is nothing
    to mask, when scores are there already, or those of `first`.
    """
    layers = maskable(network)
    if not layers:
        raise ValueError("the network has no Conv2d and no Linear, so there is nothing to prune")
    if has_scores(network):
        raise ValueError("the network has scores already; attach them once")
    shapes = {name: _original(layer).shape for name, layer in layers.items()}
    for name, layer in layers.items():
        score = first(name, _original(layer))
        masked = Masked(score, score.new_zeros(1) if allocation == "learned" else None)
        masked.train(layer.training)
        parametrize.register_parametrization(layer, "weight", masked)
    setattr(_root(network), _DEAL, deal_of(shapes, keep_fraction, allocation))
    refresh_masks(network)


def weights_moved(network: nn.Module) -> None:
    """Make masked weights anew at their next use, after an optimizer's step; other changes are noticed."""
    for entry in _masked(network).values():
        entry.weight_moved()


@torch.no_grad()
def refresh_masks(network: nn.Module) -> None:
    """Make every mask the top-k of its scores again; call it once after each optimizer step that moved them.

    Errors: ValueError naming the weight whose scores are NaN.
    """
    masked = _masked(network)
    if not masked:
        return
    deal: Deal = getattr(_root(network), _DEAL)
    scores = {name: entry.score for name, entry in masked.items()}
    rates = {name: entry.rate for name, entry in masked.items() if entry.rate is not None}
    masks = deal(scores, rates)
    for name, entry in masked.items():
        entry.mask.copy_(masks[name])


def masks_of(network: nn.Module) -> dict[str, Tensor]:
    """Plain weight name -> the live bool mask that it has now; empty without scores."""
    return {name: entry.mask for name, entry in _masked(network).items()}


@torch.no_grad()
def first_masks(network: nn.Module, first: FirstScore) -> dict[str, Tensor]:
    """The masks that `attach_scores` would make of the network's present weights, by the budget that it has.

    Its own scores and masks stay. Errors: those of `first`.
    """
    layers, masked = maskable(network), _masked(network)
    deal: Deal = getattr(_root(network), _DEAL)
    scores = {name: first(name, _original(layers[name])) for name in masked}
    rates = {name: torch.zeros_like(entry.rate) for name, entry in masked.items() if entry.rate is not None}
    return deal(scores, rates)


def train_only(network: nn.Module, what: Literal["weights", "scores"], batchnorm: BatchNormMode = "trained") -> None:
    """Set requires_grad for a phase, of a network in training mode.

    weights: every weight, bias and normalisation parameter trains, scores are frozen (pretrain, finetune).
    scores: scores, rates and the affine parameters of normalisation layers train, all else is frozen (prune).
    scores, with BatchNorm frozen: its affine parameters do not train either, and it is put in eval mode, so that it
    normalises by its running statistics, which stay. (The reference's --freeze-bn freezes the affine parameters only:
    its training forwards go on normalising by the batch, and updating the running statistics.)
    Errors: ValueError for "scores" on a network that has none.
    """
    masked = _masked(network)
    if what == "scores" and not masked:
        raise ValueError("the network has no scores to train; call attach_scores first")
    for parameter in network.parameters():
        parameter.requires_grad_(what == "weights")
    if what == "scores":
        for module in network.modules():
            if isinstance(module, _BatchNorm) and batchnorm == "frozen":
                module.eval()
            elif isinstance(module, NORMALISATION):
                for parameter in module.parameters(recurse=False):
                    parameter.requires_grad_(True)
    for entry in masked.values():
        for parameter in entry.parameters():
            parameter.requires_grad_(what == "scores")


def named_state(network: nn.Module) -> dict[str, Tensor]:
    """The live tensors that a checkpoint holds, under plain names.

    'weight/conv1.weight', 'weight/bn1.bias', 'score/conv1.weight', 'rate/conv1.weight' (learned allocation),
    'buffer/bn1.running_mean'. A tensor that the network uses under two names appears once. Masks and the normalisation
    are not state.
    """
    state: dict[str, Tensor] = {}
    seen: set[int] = set()
    for key, tensor in _root(network).state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            state[_state_name(key, tensor)] = tensor
    return state


def _state_name(key: str, tensor: Tensor) -> str:
    for kind, part in (("score/", _SCORE), ("rate/", _RATE), ("weight/", _ORIGINAL)):
        if key.endswith(part):
            return kind + key.removesuffix(part) + "weight"
    return ("weight/" if isinstance(tensor, nn.Parameter) else "buffer/") + key


def trained_parameters(network: nn.Module) -> dict[str, nn.Parameter]:
    """Those of `named_state` that have requires_grad: what the phase's optimizer holds."""
    state = named_state(network).items()
    return {name: value for name, value in state if isinstance(value, nn.Parameter) and value.requires_grad}


@torch.no_grad()
def load_state(network: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy `tensors`, named as in `named_state`, into the network in place; masks follow the loaded scores.

    Errors: ValueError naming missing and unexpected names, or a tensor of another shape; then nothing was copied.
    """
    state = named_state(network)
    missing, unexpected = sorted(state.keys() - tensors.keys()), sorted(tensors.keys() - state.keys())
    if missing or unexpected:
        raise ValueError(f"the state does not fit the network: missing {missing}, unexpected {unexpected}")
    for name, tensor in state.items():
        if tensor.shape != tensors[name].shape:
            raise ValueError(f"{name}: the network has {tuple(tensor.shape)}, the state {tuple(tensors[name].shape)}")
    for name, tensor in state.items():
        tensor.copy_(tensors[name])
    refresh_masks(network)


@torch.no_grad()
def effective_state(network: nn.Module) -> dict[str, Tensor]:
    """The network as a plain one: the backbone's own names, pruned weights zero in place, detached copies.

    It is what a plain model of the architecture loads with strict=True.
    """
    layers = maskable(network).values()
    masks = {id(_original(layer)): masked.mask for layer in layers if (masked := _parametrization(layer))}
    state: dict[str, Tensor] = {}
    for key, tensor in _root(network).state_dict(keep_vars=True).items():
        kind, name = _state_name(key, tensor).split("/", 1)
        if kind in ("score", "rate"):
            continue
        value = tensor.detach().clone(memory_format=torch.contiguous_format)
        if (mask := masks.get(id(tensor))) is not None:
            value.masked_fill_(~mask, 0.0)  # a product would leave -0.0 for negative weights
        state[name] = value
    return state


def layer_counts(network: nn.Module) -> list[LayerCount]:
    """Kept and all connections per maskable weight, in the network's order; without scores all are kept."""
    counts: list[LayerCount] = []
    for name, layer in maskable(network).items():
        total = _original(layer).numel()
        masked = _parametrization(layer)
        counts.append({"name": name, "kept": int(masked.mask.sum()) if masked else total, "total": total})
    return counts


def mask_sha256(network: nn.Module) -> str | None:
    """SHA-256 over the names, shapes and bits of all masks, memory format apart; None without scores."""
    masks = _masked(network)
    if not masks:
        return None
    digest = hashlib.sha256()
    for name in sorted(masks):
        mask = masks[name].mask
        digest.update(f"{name} {tuple(mask.shape)}\n".encode())
        digest.update(np.packbits(mask.cpu().contiguous().numpy()).tobytes())
    return digest.hexdigest()


@contextmanager
def cached_weights(
    network: nn.Module, autocast: Callable[[], AbstractContextManager[Any]] = nullcontext
) -> Iterator[None]:
    """Compute every masked weight once, and without a graph, for all forwards inside the context.

    Under `autocast` they are in its precision, so that no forward has to cast them.

    An attack's forwards then build no graph to weights or scores; gradients to the input flow as ever. Without scores
    there is nothing to compute.
    """
    with parametrize.cached():
        with torch.no_grad(), autocast():
            weights = [layer.weight for layer in masked_layers(network)]
        assert not any(weight.requires_grad for weight in weights), "a graph was cached before this context"
        yield
