"""A network's state under plain names: for checkpoints, optimizers, export and connection counts.

Plain names are the backbone's own ('layer1.0.conv1.weight'), with or without scores and wrappers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, TypedDict

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pipeline.models.pruning.maskable import backbone_of, maskable
from pipeline.models.pruning.scores import Scores
from pipeline.recipe.sparsity import BatchNormMode

NORMALISATION = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)

_ORIGINAL = "parametrizations.weight.original"
_SCORE = "parametrizations.weight.0.score"
_RATE = "parametrizations.weight.0.rate"
_MASK = "parametrizations.weight.0.mask"


class LayerCount(TypedDict):
    """Kept and total connections of one weight."""

    name: str
    kept: int
    total: int


def named_state(network: nn.Module) -> dict[str, Tensor]:
    """The live tensors that a checkpoint holds, under plain names.

    'weight/conv1.weight', 'weight/bn1.bias', 'score/conv1.weight', 'rate/conv1.weight' (learned allocation),
    'buffer/bn1.running_mean'. A tensor registered under two names appears once. Masks, and the normalisation's mean and
    std, are not part of it.
    """
    state: dict[str, Tensor] = {}
    seen: set[int] = set()
    for key, tensor in backbone_of(network).state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            state[_state_name(key, tensor)] = tensor
    return state


def _state_name(key: str, tensor: Tensor) -> str:
    for kind, part in (("score/", _SCORE), ("rate/", _RATE), ("weight/", _ORIGINAL)):
        if key.endswith(part):
            return kind + key.removesuffix(part) + "weight"
    return ("weight/" if isinstance(tensor, nn.Parameter) else "buffer/") + key


def _is_score(name: str) -> bool:
    return name.startswith(("score/", "rate/"))


def train_only(network: nn.Module, what: Literal["weights", "scores"], batchnorm: BatchNormMode = "trained") -> None:
    """Set requires_grad for a phase; the network must be in training mode.

    weights: every weight, bias and normalisation parameter trains, scores are frozen (pretrain, finetune).
    scores: scores, rates and the affine parameters of normalisation layers train, the rest is frozen (prune).
    scores, with batchnorm "frozen": BatchNorm's affine parameters are frozen too, and it is set to eval mode, so that
    it normalises by its running statistics and does not update them. (The reference code's --freeze-bn freezes the
    affine parameters only: training forwards still normalise by the batch and update the running statistics.)
    Errors: ValueError for "scores" on a network without scores.
    """
    scores = [tensor for name, tensor in named_state(network).items() if _is_score(name)]
    if what == "scores" and not scores:
        raise ValueError("the network has no scores to train; attach them first")
    for parameter in network.parameters():
        parameter.requires_grad_(what == "weights")
    if what == "scores":
        for module in network.modules():
            if isinstance(module, _BatchNorm) and batchnorm == "frozen":
                module.eval()
            elif isinstance(module, NORMALISATION):
                for parameter in module.parameters(recurse=False):
                    parameter.requires_grad_(True)
    for score in scores:
        score.requires_grad_(what == "scores")


def trained_parameters(network: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of `named_state` that require grad: those of the phase's optimizer."""
    state = named_state(network).items()
    return {name: value for name, value in state if isinstance(value, nn.Parameter) and value.requires_grad}


@torch.no_grad()
def load_state(network: nn.Module, tensors: Mapping[str, Tensor], scores: Scores | None = None) -> None:
    """Copy `tensors`, named as in `named_state`, into the network in place; masks are recomputed.

    `scores` is required if the network has scores. Errors: ValueError naming missing and unexpected names, or a shape
    mismatch; then nothing was copied.
    """
    state = named_state(network)
    missing, unexpected = sorted(state.keys() - tensors.keys()), sorted(tensors.keys() - state.keys())
    if missing or unexpected:
        raise ValueError(f"the state does not fit the network: missing {missing}, unexpected {unexpected}")
    for name, tensor in state.items():
        if tensor.shape != tensors[name].shape:
            raise ValueError(f"{name}: the network has {tuple(tensor.shape)}, the state {tuple(tensors[name].shape)}")
    assert any(map(_is_score, state)) == (scores is not None), "pass `scores` exactly if the network has scores"
    for name, tensor in state.items():
        tensor.copy_(tensors[name])
    if scores is not None:
        scores.refresh()


def _masks(network: nn.Module) -> dict[str, Tensor]:
    """Plain weight name -> bool mask; a layer registered under two names appears twice."""
    buffers = backbone_of(network).named_buffers(remove_duplicate=False)
    return {name.removesuffix(_MASK) + "weight": mask for name, mask in buffers if name.endswith(_MASK)}


@torch.no_grad()
def effective_state(network: nn.Module) -> dict[str, Tensor]:
    """Detached copies of the backbone's tensors under their own names, pruned weights zero in place.

    A plain model of the architecture loads it with strict=True.
    """
    masks = _masks(network)
    state: dict[str, Tensor] = {}
    for key, tensor in backbone_of(network).state_dict(keep_vars=True).items():
        kind, name = _state_name(key, tensor).split("/", 1)
        if kind in ("score", "rate"):
            continue
        value = tensor.detach().clone(memory_format=torch.contiguous_format)
        if (mask := masks.get(name)) is not None:
            value.masked_fill_(~mask, 0.0)  # multiplying would leave -0.0 for negative weights
        state[name] = value
    return state


def layer_counts(network: nn.Module) -> list[LayerCount]:
    """Kept and total connections per maskable weight, in network order; without scores all are kept."""
    state, masks = named_state(network), _masks(network)
    counts: list[LayerCount] = []
    for name in maskable(network):
        total = state[f"weight/{name}"].numel()
        counts.append({"name": name, "kept": int(masks[name].sum()) if name in masks else total, "total": total})
    return counts
