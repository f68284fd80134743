"""The network of a run with `structure: channel` without the channels that were pruned: a smaller plain network."""

from __future__ import annotations

from pathlib import Path

import torch

from pipeline.deployment.onnx_file import CHECKED, check_same, random_images
from pipeline.evaluation.load import LoadedNetwork
from pipeline.models.export import ORIGIN, write_model
from pipeline.models.pruning.channel_removal import read_channels, remove_channels
from pipeline.models.pruning.channels import find_channels
from pipeline.recipe.sections import Model


def has_pruned_channels(network: LoadedNetwork) -> bool:
    """Whether they are zeros in place."""
    return network.metadata.get("structure") == "channel" and "widths" not in network.metadata


def write_smaller(network: LoadedNetwork, image_size: int, path: Path) -> LoadedNetwork:
    """Write the network without the channels that no layer reads to `path`, a file like `model.safetensors` of a stage.

    Compared with the network before it is written. Errors: CannotExport.
    """
    channels = find_channels(network, image_size)
    smaller, widths = remove_channels(network, channels, read_channels(network, channels))
    images = random_images(CHECKED, image_size, seed=1)
    with torch.inference_mode():
        check_same(network, images, smaller(images).numpy(), "the network without its pruned channels")
    facts = {key: value for key, value in network.metadata.items() if key != "mask_sha256"}  # of other shapes
    model = Model.model_validate({key: facts[key] for key in Model.model_fields if key not in ORIGIN})
    write_model(path, smaller.backbone.state_dict(), model, {**facts, "image_size": image_size, "widths": widths})
    return LoadedNetwork(path)
