"""The exported network of a stage: `model.safetensors`, which a plain torchvision model of the architecture loads.

    model = torchvision.models.resnet50()
    model.load_state_dict(safetensors.torch.load_file("model.safetensors"))

Pruned connections are zeros in place. mean, std, keep_fraction, mask and recipe hash are in the file's metadata, not in
tensors: a plain model expects (pixels in [0, 1] - mean) / std.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from pipeline.models import Network, build_network
from pipeline.models.pruning.channel_removal import set_widths
from pipeline.recipe.sections import Model
from pipeline.run.files import parse_json, replacing, settle_file

METADATA_KEY = "network"
"""Architecture, mean, std, keep_fraction and hashes, as one JSON object."""
ORIGIN = {"weights", "weights_keep_fraction", "weights_head"}
"""Keys of the recipe's model section that name the initial weights; not part of the exported network."""


def write_model(path: Path, tensors: dict[str, torch.Tensor], model: Model, extra_metadata: dict[str, Any]) -> None:
    """Write the network atomically; `extra_metadata` (JSON values) joins architecture, mean and std in the metadata.

    `load_model` builds the network for `extra_metadata["image_size"]`; architectures of a fixed size need it. Without
    some of its channels, its sizes are `extra_metadata["widths"]` (see `channel_removal`).
    """
    model_metadata = model.model_dump(mode="json", exclude=ORIGIN)
    # A single entry: safetensors writes several in random order, and equal networks must give equal files.
    metadata = {METADATA_KEY: json.dumps({**model_metadata, **extra_metadata}, sort_keys=True)}
    with replacing(path) as temporary:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, temporary, metadata)
        settle_file(temporary)


def read_metadata(path: Path) -> dict[str, Any]:
    """The metadata that `write_model` wrote.

    Errors: KeyError if another program wrote the file; ValueError if it is damaged.
    """
    with safe_open(path, framework="pt") as stream:
        return parse_json((stream.metadata() or {})[METADATA_KEY])


def load_model(path: Path) -> Network:
    """An exported network as a plain module on the CPU. Errors: ValueError naming the file."""
    if not path.is_file():
        raise ValueError(f"{path} does not exist; a stage writes it when it is finished")
    try:
        metadata = read_metadata(path)
        model = Model.model_validate({key: metadata[key] for key in Model.model_fields if key not in ORIGIN})
        network = build_network(model, seed=0, image_size=metadata.get("image_size"))
        set_widths(network.backbone, metadata.get("widths", {}))
        network.backbone.load_state_dict(load_file(path))
    except (SafetensorError, AttributeError, KeyError, TypeError, ValueError, RuntimeError, OSError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} is damaged or was not written by this project: {reason}") from None
    return network
