"""Images on which another machine can check an exported folder, with the answers that are expected there.

They are drawn, not taken from a data set, so that a folder can be published whatever the data set's licence says.
"""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from pipeline.models import Network
from pipeline.run.files import replacing

COUNT = 4
COARSE = 7
"""Side of the coarse noise that is enlarged to an image: smooth images compress well, and look like nothing."""
NETWORK = "network"
"""Key of the network's logits; those of a file are under its name."""


def write_check_images(path: Path, network: Network, image_size: int, logits_of: dict[str, Path]) -> None:
    """Write uint8 images [COUNT, 3, size, size] and logits [COUNT, classes]; `logits_of`: name -> ONNX file."""
    from pipeline.deployment.onnx_file import logits_of as answers

    noise = torch.rand(COUNT, 3, COARSE, COARSE, generator=torch.Generator().manual_seed(0))
    smooth = F.interpolate(noise, size=(image_size, image_size), mode="bilinear", align_corners=True)
    images = (smooth * 255).round().to(torch.uint8).numpy()
    with torch.inference_mode():
        logits = {NETWORK: network(torch.from_numpy(as_input(images))).numpy()}
    logits |= {name: answers(file, as_input(images)) for name, file in logits_of.items()}
    with replacing(path) as temporary, temporary.open("wb") as stream:
        np.savez_compressed(stream, images=images, **logits)


def read_check_images(path: Path) -> dict[str, NDArray[np.generic]]:
    """Errors: ValueError naming the file."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} cannot be read: {error}; restore it, or export again") from None
    images = arrays.get("images")
    if images is None or images.dtype != np.uint8 or images.ndim != 4 or NETWORK not in arrays:
        raise ValueError(f"{path} has no images with logits; restore it, or export again")
    return arrays


def as_input(images: NDArray[np.generic]) -> NDArray[np.float32]:
    """uint8 -> float32 in [0, 1]."""
    return images.astype(np.float32) / np.float32(255)
