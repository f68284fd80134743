"""What a finished file must be, whatever network it was written from: as sparse as it says, and plain."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path

from safetensors.torch import load_file
from torch import nn
from torchvision.transforms import Normalize

from pipeline.evaluation.honesty.checks import build_check
from pipeline.evaluation.result import Check
from pipeline.models.export import load_model, read_metadata
from pipeline.models.pruning.scores import maskable
from pipeline.models.pruning.topk import kept_count


def plain_network(path: Path) -> nn.Module:
    """The file as a stranger would use it: the bare architecture, fed with images normalised as the metadata says.

    On the CPU, in eval mode. Errors: those of `load_model`.
    """
    metadata = read_metadata(path)
    return nn.Sequential(Normalize(metadata["mean"], metadata["std"]), load_model(path).backbone).eval()


def mask_check(path: Path) -> Check:
    """Whether a file has no more connections than the keep_fraction in its metadata allows.

    Allowed is n - floor((1 - k) n) of each layer, taken together: what `uniform` keeps, at most one per layer more than
    any other allocation does. Kept weights that are zero are no fault. Errors: those of `load_model`.
    """
    keep = Decimal(read_metadata(path)["keep_fraction"] or 1)
    tensors = load_file(path)
    weights = [tensors[name] for name in maskable(load_model(path))]
    total = sum(weight.numel() for weight in weights)
    allowed = sum(kept_count(weight.numel(), keep) for weight in weights)
    present = sum(int(weight.count_nonzero()) for weight in weights)
    return build_check(
        "mask",
        present > allowed,
        f"{present:,} of {total:,} connections are there, keep_fraction {keep} allows {allowed:,}",
        "The mask was not applied to what was written, so the file is not the sparse network that its accuracies are "
        "compared as; remove it together with result.json and resume.",
    )
