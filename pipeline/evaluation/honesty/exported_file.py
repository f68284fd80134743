"""Checks of an exported file on its own: its sparsity, and that it loads as a plain network."""

from __future__ import annotations

import math
from decimal import Decimal
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn
from torchvision.transforms import Normalize

from pipeline.evaluation.honesty.checks import build_check
from pipeline.evaluation.result import Check
from pipeline.models import Network
from pipeline.models.export import load_model, read_metadata
from pipeline.models.pruning.channel_removal import read_channels
from pipeline.models.pruning.channels import find_channels
from pipeline.models.pruning.maskable import maskable
from pipeline.models.pruning.multiply_accumulates import MultiplyAccumulates
from pipeline.models.pruning.structure import build_structure


def plain_network(path: Path) -> nn.Module:
    """Load the file without this project's wrapper: the bare architecture behind the normalisation of the metadata.

    On the CPU, in eval mode. Errors: those of `load_model`.
    """
    metadata = read_metadata(path)
    return nn.Sequential(Normalize(metadata["mean"], metadata["std"]), load_model(path).backbone).eval()


def mask_check(path: Path) -> Check:
    """Check that a file has at most as many nonzero weights as the keep_fraction k in its metadata allows.

    The limit is the sum of n - floor((1 - k) n) over layers of n weights, or of n units of the structure: what
    `uniform` keeps, at most one per layer more than any other allocation. Kept weights may be zero. Errors: those of
    `load_model`. Of channels, those that a layer reads are counted, by their multiply-accumulates.
    """
    metadata = read_metadata(path)
    keep, structure = Decimal(metadata["keep_fraction"] or 1), metadata.get("structure", "unstructured")
    if structure == "channel":
        return _channel_check(load_model(path), metadata["image_size"], keep)
    tensors = load_file(path)
    weights = {name: tensors[name] for name in maskable(load_model(path))}
    total = sum(weight.numel() for weight in weights.values())
    rule = build_structure(structure, {n: w.shape for n, w in weights.items()}).mask_rule(keep, "uniform")
    fullest = rule({name: torch.zeros_like(weight) for name, weight in weights.items()}, {})
    limit = sum(int(mask.sum()) for mask in fullest.values())
    present = sum(int(weight.count_nonzero()) for weight in weights.values())
    return _mask_check(present, total, limit, keep, "weights are nonzero")


def _channel_check(network: Network, image_size: int, keep: Decimal) -> Check:
    channels = find_channels(network, image_size)
    costs = MultiplyAccumulates(channels)
    total = costs.total(np.ones(channels.count + 1, np.bool_))
    present = costs.total(read_channels(network, channels))
    return _mask_check(present, total, math.floor(keep * total), keep, "multiply-accumulates are of channels in use")


def _mask_check(present: int, total: int, limit: int, keep: Decimal, what: str) -> Check:
    return build_check(
        "mask",
        present > limit,
        f"{present:,} of {total:,} {what}; keep_fraction {keep} allows {limit:,}",
        "The mask was not applied on export, so the file is denser than the sparsity that its accuracies are reported "
        "for; delete it together with result.json and resume.",
    )
