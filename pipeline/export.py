"""The result of a stage: `model.safetensors` that a plain torchvision model of the same architecture loads.

    model = torchvision.models.resnet50()
    model.load_state_dict(safetensors.torch.load_file("model.safetensors"))

Pruned connections are zeros in place. mean, std, keep_fraction, mask and recipe hash are in the file's metadata, not in
tensors: images go in as (pixels in [0, 1] - mean) / std.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from pipeline.files import fsync_file, fsync_folder
from pipeline.models import Network, build_network
from pipeline.recipe import Model


def write_model(path: Path, tensors: dict[str, torch.Tensor], model: Model, facts: dict[str, Any]) -> None:
    """Write the finished network atomically; `facts` (JSON values) join architecture, mean and std in the metadata."""
    metadata = {key: json.dumps(value) for key, value in {**model.model_dump(mode="json"), **facts}.items()}
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, temporary, metadata)
        fsync_file(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    fsync_folder(path.parent)


def read_metadata(path: Path) -> dict[str, Any]:
    with safe_open(path, framework="pt") as stream:
        return {key: json.loads(value) for key, value in (stream.metadata() or {}).items()}


def load_model(path: Path) -> Network:
    """A finished network as a plain module on the CPU. Errors: ValueError naming the file."""
    if not path.is_file():
        raise ValueError(f"{path} does not exist; a stage writes it when it is finished")
    metadata = read_metadata(path)
    try:
        model = Model.model_validate({key: metadata[key] for key in Model.model_fields})
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"{path} was not written by this project: its metadata lacks the architecture ({error})"
        ) from None
    network = build_network(model, seed=0)
    network.backbone.load_state_dict(load_file(path))
    return network
