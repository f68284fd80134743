"""Initial weights from third-party checkpoints: torchvision, timm, RobustBench, HYDRA's reference code.

A file is safetensors, or a pickled state dict that is read with `weights_only`, so that no code in it runs. Its names
are mapped to the network's by the `LAYOUTS` entry that fits best; then every name and shape must match. Otherwise all
mismatches are listed and nothing is loaded. A normalisation stored in the file must equal the recipe's; most files
store none, and then model.mean and model.std are not checked.
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
from pipeline.models.torch_file import RefusedFile, check_tensor, check_torch_file
from pipeline.recipe.sections import Model

CONTAINERS = ("state_dict", "model_state_dict", "model", "net")
"""Keys under which training programs store the state dict."""
WRAPPERS = ("module.", "model.", "backbone.", "1.")
"""Name prefixes added by DataParallel, by a wrapper module, and by a Sequential of normalisation and network."""
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


class _Mismatch(NamedTuple):
    missing: list[str]
    unexpected: list[str]
    shapes: list[str]

    @property
    def size(self) -> int:
        return len(self.missing) + len(self.unexpected) + len(self.shapes)


def load_foreign(network: Network, path: Path, model: Model) -> None:
    """Load the weights of `path` into a freshly built network without scores, in place, cast to the network's dtypes.

    With model.weights_keep_fraction, weights are multiplied by the mask of the file's own scores at that keep fraction,
    rounded as in HYDRA's reference code (`models/layers.py`). Without it, scores are ignored.
    num_batches_tracked may be missing, as in files from before PyTorch 0.4.1: it is never read.
    Errors: ValueError naming the file and every mismatch; then nothing was loaded.
    """
    tensors = _read(path)
    normalisation = {name: tensor for name, tensor in tensors.items() if name.rsplit(".", 1)[-1] in MEANS + STDS}
    _check_normalisation(path, normalisation, model)
    bare = _strip_wrappers({name: tensor for name, tensor in tensors.items() if name not in normalisation})
    scores = {name.removesuffix(SCORES): tensor for name, tensor in bare.items() if name.endswith(SCORES)}
    weights = {name: tensor for name, tensor in bare.items() if not name.endswith(SCORES)}
    if model.weights_keep_fraction is not None:
        weights = _apply_masks(path, weights, scores, model.weights_keep_fraction)

    expected = network.backbone.state_dict()
    candidates = {layout: _rename(weights, table) for layout, table in LAYOUTS.items()}
    mismatches = {layout: _compare(expected, candidate) for layout, candidate in candidates.items()}
    layout = min(mismatches, key=lambda name: mismatches[name].size)
    if mismatches[layout].size:
        missing, unexpected, shapes = mismatches[layout]
        raise ValueError(
            f"{path} does not fit model.arch {model.arch} with num_classes {model.num_classes}, read as {layout}: "
            f"missing {missing}, unexpected {unexpected}, shape mismatch {shapes}; "
            "set model.arch to the file's architecture, or give another file"
        )
    tensors = candidates[layout]
    nonfinite = sorted(name for name, tensor in tensors.items() if not bool(tensor.isfinite().all()))
    if nonfinite:
        raise ValueError(f"{path} holds NaN or infinity in {nonfinite}; use another checkpoint of that training run")
    for name, tensor in expected.items():
        if name in tensors:
            tensor.copy_(tensors[name])


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise ValueError(f"model.weights {path} does not exist")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    try:
        check_torch_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except RefusedFile:
        raise
    except PermissionError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except Exception as error:  # a damaged archive or pickle may raise anything
        if isinstance(error, pickle.UnpicklingError) and (match := re.search(r"GLOBAL (\S+)", str(error))):
            raise ValueError(
                f"{path} was not read: it refers to {match[1]}, and loading anything but tensors could run code. If "
                "you trust the file, load it elsewhere and save its state dict alone, preferably as .safetensors"
            ) from None
        # torch's message recommends loading without weights_only, so it is not shown.
        raise ValueError(
            f"{path} is damaged or not a weights file ({type(error).__name__}); download it again"
        ) from None
    return _state_dict_of(path, content)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        tensors = load_file(path)
        with safe_open(path, framework="pt") as stream:
            metadata = json.loads((stream.metadata() or {}).get(METADATA_KEY, "{}"))
        # Networks exported by this project store their normalisation in the metadata.
        normalisation = {f"metadata.{key}": torch.tensor(metadata[key]) for key in ("mean", "std") if key in metadata}
    except (SafetensorError, ValueError, TypeError, RuntimeError) as error:  # a RecursionError is a RuntimeError
        raise ValueError(f"{path} is damaged or not safetensors: {' '.join(str(error).split())}") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from None
    return tensors | normalisation


def _state_dict_of(path: Path, content: Any) -> dict[str, Tensor]:
    if isinstance(content, Mapping):
        if content and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in content.items()):
            for name, tensor in content.items():
                check_tensor(path, name, tensor)
            return dict(content)
        for container in CONTAINERS:
            if isinstance(content.get(container), Mapping):
                return _state_dict_of(path, content[container])
        content_kind = f"a mapping with the keys {sorted(str(key) for key in content)}"
    else:
        content_kind = type(content).__name__
    raise ValueError(
        f"{path} holds {content_kind}; expected a state dict, alone or under one of {', '.join(CONTAINERS)}"
    )


def _strip_wrappers(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Strip wrapper prefixes that all names share."""
    for prefix in WRAPPERS:
        if tensors and all(name.startswith(prefix) for name in tensors):
            return _strip_wrappers({name.removeprefix(prefix): tensor for name, tensor in tensors.items()})
    return tensors


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


def _rename(tensors: dict[str, Tensor], table: tuple[tuple[str, str | None], ...]) -> dict[str, Tensor]:
    tensors_by_name: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        new: str | None = name
        for pattern, replacement in table:
            if new is not None and re.search(pattern, new):
                new = None if replacement is None else re.sub(pattern, replacement, new)
        if new is not None:
            tensors_by_name[new] = tensor
    return tensors_by_name


def _compare(expected: Mapping[str, Tensor], actual: Mapping[str, Tensor]) -> _Mismatch:
    missing = [name for name in expected if name not in actual and not name.endswith("num_batches_tracked")]
    unexpected = [name for name in actual if name not in expected]
    shapes = [
        f"{name} ({tuple(actual[name].shape)} in the file, {tuple(tensor.shape)} in the network)"
        for name, tensor in expected.items()
        if name in actual and actual[name].shape != tensor.shape
    ]
    return _Mismatch(missing, unexpected, shapes)
