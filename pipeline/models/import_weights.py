"""Initial weights from third-party checkpoints: torchvision, timm, RobustBench, HYDRA's reference code.

The names of a file's state dict are mapped to the network's by the prefix and the `LAYOUTS` entry that fit best; then
every name, shape and kind of number must match. Otherwise all mismatches are listed and nothing is loaded. A
normalisation stored in the file must equal the recipe's; most files store none, and then model.mean and model.std are
not checked.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from decimal import Decimal
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.models import Network, head_names
from pipeline.models.pruning.topk import topk_mask
from pipeline.models.state_dict_file import read_state_dict
from pipeline.recipe.sections import Model
from pipeline.run.initial_weights import weights_file

TRANSPARENT = re.compile(r"(?<![^.])(_orig_mod\.|attacker\.(?=model\.))")
"""Components of names that name no other tensor: torch.compile's wrapper, and the second reference to the network that
MadryLab's robustness stores, as the attacker's."""
MEANS = ("mean", "mu", "new_mean")
STDS = ("std", "sigma", "new_std")
"""Last components of the names of a normalisation's tensors."""
SCORES = ".popup_scores"
"""HYDRA's reference code stores a layer's importance scores next to its `.weight`."""

LAYOUTS: dict[str, tuple[tuple[str, str | None], ...]] = {
    "the network's own names": (),
    "CIFAR ResNets of HYDRA's reference and RobustBench": ((r"\.shortcut\.", ".downsample."), (r"^linear\.", "fc.")),
    "wide ResNets with the first group twice": ((r"^sub_block1\..*", None),),
    "torchvision's first DenseNets": ((r"(denselayer\d+\.(?:norm|conv))\.([12]\.)", r"\1\2"),),
}
"""Source of the names -> (pattern, replacement) in order; None drops a tensor that no forward pass uses."""


FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
"""Of counters and tables of indices, never of weights."""
FLOATS_ONLY = "weights must be float32, float64, float16 or bfloat16: convert them, and save the state dict again"


class _Mismatch(NamedTuple):
    missing: list[str]
    unexpected: list[str]
    shapes: list[str]

    @property
    def size(self) -> int:
        return len(self.missing) + len(self.unexpected) + len(self.shapes)


@torch.no_grad()
def load_foreign(network: Network, path: Path, model: Model, image_size: int | None = None) -> None:
    """Load the weights of `path` into a freshly built network without scores, in place, cast to the network's dtypes.

    `path` may be a run's folder (`weights_file`). With model.weights_keep_fraction, weights are multiplied by the mask
    of the file's own scores at that keep fraction, rounded as in HYDRA's reference code (`models/layers.py`). Without
    it, scores are ignored. With model.weights_head "new", the last layer stays as built; networks of one size need
    `image_size` for that. num_batches_tracked may be missing, as in files from before PyTorch 0.4.1: it is never read.
    Errors: ValueError naming the file and every mismatch; then nothing was loaded.
    """
    path = weights_file(path)
    tensors = _without_wrappers(path, read_state_dict(path))
    normalisation = {name: tensor for name, tensor in tensors.items() if name.rsplit(".", 1)[-1] in MEANS + STDS}
    _check_normalisation(path, normalisation, model)
    bare = {name: tensor for name, tensor in tensors.items() if name not in normalisation}
    scores = {name.removesuffix(SCORES): tensor for name, tensor in bare.items() if name.endswith(SCORES)}
    weights = {name: tensor for name, tensor in bare.items() if not name.endswith(SCORES)}
    if model.weights_keep_fraction is not None:
        weights = _apply_masks(path, weights, scores, model.weights_keep_fraction)

    head = head_names(network, model, image_size) if model.weights_head == "new" else frozenset[str]()
    expected = {name: tensor for name, tensor in network.backbone.state_dict().items() if name not in head}
    layout, names, mismatch = _closest(expected, weights, head)
    if mismatch.size:
        raise ValueError(
            f"{path} does not fit model.arch {model.arch} with num_classes {model.num_classes}, read as {layout}: "
            f"missing {mismatch.missing}, unexpected {mismatch.unexpected}, shape mismatch {mismatch.shapes}; "
            f"{_remedy(network, model, image_size, mismatch)}"
        )
    for name, source in names.items():
        if expected[name].is_floating_point() and not weights[source].is_floating_point():
            raise ValueError(f"{path}: {source} is {_dtype(weights[source])}; {FLOATS_ONLY}")
    nonfinite = sorted(name for name, source in names.items() if not bool(weights[source].isfinite().all()))
    if nonfinite:
        raise ValueError(f"{path} holds NaN or infinity in {nonfinite}; use another checkpoint of that training run")
    for name, source in names.items():
        expected[name].copy_(weights[source])


def _without_wrappers(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Remove TRANSPARENT components of names. Errors: ValueError for kinds of numbers that no weight is, and for two
    tensors of one name that differ."""
    sources: dict[str, str] = {}
    for source, tensor in tensors.items():
        if tensor.dtype not in (*FLOATS, *INTEGERS):
            raise ValueError(f"{path}: {source} is {_dtype(tensor)}; {FLOATS_ONLY}")
        first = sources.setdefault(TRANSPARENT.sub("", source), source)
        if first != source and not torch.equal(tensors[first], tensor):
            raise ValueError(
                f"{path}: {first} and {source} should be the same tensor and differ; save the state dict of one network"
            )
    return {name: tensors[source] for name, source in sources.items()}


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _check_normalisation(path: Path, normalisation: dict[str, Tensor], model: Model) -> None:
    problems = []
    for name, tensor in normalisation.items():
        key = "mean" if name.rsplit(".", 1)[-1] in MEANS else "std"
        expected = torch.tensor(getattr(model, key))
        values = tensor.detach().to(torch.float32).flatten()
        values = values.expand(3) if values.numel() == 1 else values
        if values.shape != expected.shape or not torch.allclose(values, expected, rtol=0, atol=1e-6):
            if values.numel() != expected.numel():
                problems.append(f"{name} has the shape {list(tensor.shape)}, and model.{key} has 3 values")
                continue
            rounded = [round(float(value), 6) for value in values]
            problems.append(
                f"{name} is {rounded}, but model.{key} is {list(getattr(model, key))}; set model.{key}={rounded}"
            )
    if problems:
        raise ValueError(f"{path} has another normalisation than the recipe: {'; '.join(problems)}")


def _apply_masks(
    path: Path, weights: dict[str, Tensor], scores: dict[str, Tensor], keep_fraction: Decimal
) -> dict[str, Tensor]:
    if not scores:
        raise ValueError(
            f"{path} holds no popup_scores, so there is no mask to apply; remove model.weights_keep_fraction"
        )
    masked_weights = dict(weights)
    for layer, score in scores.items():
        name = f"{layer}.weight"
        if name not in weights or weights[name].shape != score.shape:
            raise ValueError(
                f"{path}: {layer}{SCORES} has no {name} of the same shape {tuple(score.shape)}; the file is damaged"
            )
        # In floats, as the reference code does: (1 - 0.9) * 1000 is 99.99... and keeps 901. So the mask is its own.
        kept = score.numel() - int((1 - float(keep_fraction)) * score.numel())
        try:
            mask = topk_mask(score.float(), kept)
        except ValueError as error:
            raise ValueError(f"{path}: {layer}{SCORES}: {error}") from None
        masked_weights[name] = weights[name] * mask
    return masked_weights


def _closest(
    expected: Mapping[str, Tensor], tensors: Mapping[str, Tensor], head: frozenset[str]
) -> tuple[str, dict[str, str], _Mismatch]:
    """(layout, the network's name -> the file's, mismatch) of the prefix and layout with the fewest mismatches.

    The prefix is that of all names, or one below which the whole network is. Tensors named in `head` are left out.
    """
    best: tuple[str, dict[str, str], _Mismatch] | None = None
    for prefix in _prefixes(list(tensors)):
        others = [name for name in tensors if not name.startswith(prefix)]
        for layout, table in LAYOUTS.items():
            names = _rename([name for name in tensors if name.startswith(prefix)], prefix, table)
            names = {name: source for name, source in names.items() if name not in head}
            mismatch = _compare(expected, names, tensors, others)
            if others and mismatch.missing:  # a part of another network
                continue
            if best is None or mismatch.size < best[2].size:
                best = layout, names, mismatch
    assert best is not None
    return best


def _prefixes(names: list[str]) -> list[str]:
    """No prefix, and those that wrappers may have put before most names: "module.", "module.model." and so on.

    They are added by DataParallel, by Lightning (an attribute's name), by a Sequential of normalisation and network.
    """
    prefixes = [""]
    while components := Counter(name.split(".", 1)[0] + "." for name in names if "." in name):
        ((first, _),) = components.most_common(1)
        prefixes.append(prefixes[-1] + first)
        names = [name.removeprefix(first) for name in names if name.startswith(first)]
    return prefixes


def _rename(sources: list[str], prefix: str, table: tuple[tuple[str, str | None], ...]) -> dict[str, str]:
    """The network's name -> the file's."""
    names: dict[str, str] = {}
    for source in sources:
        new: str | None = source.removeprefix(prefix)
        for pattern, replacement in table:
            if new is not None and re.search(pattern, new):
                new = None if replacement is None else re.sub(pattern, replacement, new)
        if new is not None:
            names[new] = source
    return names


def _compare(
    expected: Mapping[str, Tensor], names: Mapping[str, str], tensors: Mapping[str, Tensor], others: list[str]
) -> _Mismatch:
    """`others` are names of the file that have no counterpart."""
    missing = [name for name in expected if name not in names and not name.endswith("num_batches_tracked")]
    unexpected = [*(source for name, source in names.items() if name not in expected), *others]
    shapes = [
        f"{name} ({tuple(tensors[names[name]].shape)} in the file, {tuple(tensor.shape)} in the network)"
        for name, tensor in expected.items()
        if name in names and tensors[names[name]].shape != tensor.shape
    ]
    return _Mismatch(missing, unexpected, shapes)


def _remedy(network: Network, model: Model, image_size: int | None, mismatch: _Mismatch) -> str:
    names = {shape.partition(" ")[0] for shape in mismatch.shapes}
    only_shapes = image_size is not None and not mismatch.missing and not mismatch.unexpected
    if only_shapes and names <= head_names(network, model, image_size):
        return "if the file is of other classes, set model.weights_head=new, which trains a new last layer"
    return "set model.arch to the file's architecture, or give another file"
