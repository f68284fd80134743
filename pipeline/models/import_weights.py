"""Weights that others trained, as the start of a run: torchvision's, timm's, RobustBench's, HYDRA's reference's.

A file is safetensors, or a pickle of a state dict that is read with `weights_only`, so that nothing in it runs. Its
names are brought to the network's by the table of `LAYOUTS` that fits best, and then every name and every shape must
agree: what does not is listed, all of it, and nothing is loaded. A normalisation that the file contains must be the
recipe's; most files say nothing of theirs, and then model.mean and model.std have to be right by themselves.
"""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from pipeline.models import Network
from pipeline.models.export import METADATA_KEY
from pipeline.models.pruning.topk import topk_mask
from pipeline.recipe.sections import Model

CONTAINERS = ("state_dict", "model_state_dict", "model", "net")
"""Where training programs put the state dict among other things."""
WRAPPERS = ("module.", "model.", "backbone.", "1.")
"""What DataParallel, a module around the network, and a Sequential after its normalisation put before every name."""
MEANS = ("mean", "mu", "new_mean")
STDS = ("std", "sigma", "new_std")
"""Last parts of the names of a normalisation's tensors."""
SCORES = ".popup_scores"
"""HYDRA's reference keeps a layer's importance scores beside its `.weight`."""

LAYOUTS: dict[str, tuple[tuple[str, str | None], ...]] = {
    "the network's own names": (),
    "CIFAR ResNets of HYDRA's reference and RobustBench": ((r"\.shortcut\.", ".downsample."), (r"^linear\.", "fc.")),
    "wide ResNets with the first group twice": ((r"^sub_block1\..*", None),),
    "torchvision's first DenseNets": ((r"(denselayer\d+\.(?:norm|conv))\.([12]\.)", r"\1\2"),),
}
"""Whose names -> (pattern, replacement) in order; None drops the tensor, which no forward pass there uses."""


class _Mismatch(NamedTuple):
    missing: list[str]
    unexpected: list[str]
    shapes: list[str]

    @property
    def size(self) -> int:
        return len(self.missing) + len(self.unexpected) + len(self.shapes)


def load_foreign(network: Network, path: Path, model: Model) -> None:
    """Put the weights of `path` into a freshly built network without scores, in place; dtypes become the network's.

    With model.weights_keep_fraction, weights are multiplied by the mask that the file's own scores make at that keep
    fraction, counted as HYDRA's reference counts (`models/layers.py` there). Without, scores are passed over.
    num_batches_tracked may be missing, as in files from before PyTorch 0.4.1: nothing here reads it.
    Errors: ValueError naming the file and everything in it that does not fit; then nothing was loaded.
    """
    tensors = _read(path)
    normalisation = {name: tensor for name, tensor in tensors.items() if name.rsplit(".", 1)[-1] in MEANS + STDS}
    _check_normalisation(path, normalisation, model)
    bare = _unwrapped({name: tensor for name, tensor in tensors.items() if name not in normalisation})
    scores = {name.removesuffix(SCORES): tensor for name, tensor in bare.items() if name.endswith(SCORES)}
    weights = {name: tensor for name, tensor in bare.items() if not name.endswith(SCORES)}
    if model.weights_keep_fraction is not None:
        weights = _masked(path, weights, scores, model.weights_keep_fraction)

    expected = network.backbone.state_dict()
    readings = {whose: _renamed(weights, table) for whose, table in LAYOUTS.items()}
    found = {whose: _compare(expected, reading) for whose, reading in readings.items()}
    whose = min(found, key=lambda name: found[name].size)
    if found[whose].size:
        missing, unexpected, shapes = found[whose]
        raise ValueError(
            f"{path} does not fit model.arch {model.arch} with num_classes {model.num_classes}, read as {whose}: "
            f"missing {missing}, unexpected {unexpected}, of another shape {shapes}; "
            "name the network that the file is of, or another file"
        )
    reading = readings[whose]
    damaged = sorted(name for name, tensor in reading.items() if not bool(tensor.isfinite().all()))
    if damaged:
        raise ValueError(f"{path} holds NaN or infinity in {damaged}; take another checkpoint of that training")
    for name, tensor in expected.items():
        if name in reading:
            tensor.copy_(reading[name])


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise ValueError(f"model.weights {path} does not exist")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged archive or pickle raises whatever its bytes lead to
        if isinstance(error, pickle.UnpicklingError) and (found := re.search(r"GLOBAL (\S+)", str(error))):
            raise ValueError(
                f"{path} was not read: it refers to {found[1]}, and what is no tensor could run a program. If you "
                "trust the file, load it elsewhere and save its state dict alone, best as .safetensors"
            ) from None
        # torch's own words advise to load without weights_only; they are not passed on.
        raise ValueError(f"{path} is damaged or no file of weights ({type(error).__name__}); fetch it again") from None
    return _state_dict_of(path, content)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        tensors = load_file(path)
        with safe_open(path, framework="pt") as stream:
            own = json.loads((stream.metadata() or {}).get(METADATA_KEY, "{}"))
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{path} is damaged or not safetensors: {' '.join(str(error).split())}") from None
    # A network that this project exported says its normalisation in the metadata.
    return tensors | {f"metadata.{key}": torch.tensor(own[key]) for key in ("mean", "std") if key in own}


def _state_dict_of(path: Path, content: Any) -> dict[str, Tensor]:
    if isinstance(content, Mapping):
        if content and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in content.items()):
            return dict(content)
        for container in CONTAINERS:
            if isinstance(content.get(container), Mapping):
                return _state_dict_of(path, content[container])
        shown = f"a mapping with the keys {sorted(str(key) for key in content)}"
    else:
        shown = type(content).__name__
    raise ValueError(f"{path} holds {shown}; expected a state dict, alone or under one of {', '.join(CONTAINERS)}")


def _unwrapped(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the wrappers' prefixes that all names share."""
    for prefix in WRAPPERS:
        if tensors and all(name.startswith(prefix) for name in tensors):
            return _unwrapped({name.removeprefix(prefix): tensor for name, tensor in tensors.items()})
    return tensors


def _check_normalisation(path: Path, found: dict[str, Tensor], model: Model) -> None:
    problems = []
    for name, tensor in found.items():
        key = "mean" if name.rsplit(".", 1)[-1] in MEANS else "std"
        wanted = torch.tensor(getattr(model, key))
        values = tensor.detach().to(torch.float32).flatten()
        values = values.expand(3) if values.numel() == 1 else values
        if values.shape != wanted.shape or not torch.allclose(values, wanted, rtol=0, atol=1e-6):
            shown = [round(float(value), 6) for value in values]
            problems.append(
                f"{name} is {shown}, but model.{key} is {list(getattr(model, key))}; set model.{key}={shown}"
            )
    if problems:
        raise ValueError(f"{path} normalises its images in another way: {'; '.join(problems)}")


def _masked(
    path: Path, weights: dict[str, Tensor], scores: dict[str, Tensor], keep_fraction: Decimal
) -> dict[str, Tensor]:
    if not scores:
        raise ValueError(
            f"{path} holds no popup_scores, so nothing says what to keep; remove model.weights_keep_fraction"
        )
    masked = dict(weights)
    for layer, score in scores.items():
        name = f"{layer}.weight"
        if name not in weights or weights[name].shape != score.shape:
            raise ValueError(
                f"{path}: {layer}{SCORES} has no {name} of its shape {tuple(score.shape)}; the file is damaged"
            )
        # In floats, as there: (1 - 0.9) * 1000 is 99.99... and keeps 901. The file's network is the one that it ran.
        kept = score.numel() - int((1 - float(keep_fraction)) * score.numel())
        try:
            mask = topk_mask(score.float(), kept)
        except ValueError as error:
            raise ValueError(f"{path}: {layer}{SCORES}: {error}") from None
        masked[name] = weights[name] * mask
    return masked


def _renamed(tensors: dict[str, Tensor], table: tuple[tuple[str, str | None], ...]) -> dict[str, Tensor]:
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        new: str | None = name
        for pattern, replacement in table:
            if new is not None and re.search(pattern, new):
                new = None if replacement is None else re.sub(pattern, replacement, new)
        if new is not None:
            renamed[new] = tensor
    return renamed


def _compare(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> _Mismatch:
    missing = [name for name in expected if name not in found and not name.endswith("num_batches_tracked")]
    unexpected = [name for name in found if name not in expected]
    shapes = [
        f"{name} ({tuple(found[name].shape)} in the file, {tuple(tensor.shape)} in the network)"
        for name, tensor in expected.items()
        if name in found and found[name].shape != tensor.shape
    ]
    return _Mismatch(missing, unexpected, shapes)
