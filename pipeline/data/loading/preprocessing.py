"""Prepares one image as a run's test images are: written to an FFCV file, read from it, cropped and resized.

Pixels equal those that `loading.loader.Loader` gives for a test file with the same image in it: the same libraries
shrink, compress, decompress and resize it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from pydantic import BaseModel, ConfigDict

from pipeline.data.loading.decoder import decode_uncompiled
from pipeline.data.loading.sampling import evaluation_crops
from pipeline.data.manifest import MODE_JPEG, MODE_RAW, DataError, Manifest
from pipeline.data.sources.decode import BrokenImage, Rendering, fit_longer_side, parse_colour, read_image, rgb_pixels


class Preprocessing(BaseModel):
    """What is done to a test image between its file and the network; calling it does that."""

    model_config = ConfigDict(frozen=True)

    image_size: int
    """Side of the result, in pixels."""
    augmentation: str
    """data.augmentation: with random_resized_crop test images are cropped centrally, otherwise they are whole."""
    image_mode: str
    """'jpg' or 'raw': how the test file stores images, as in its manifest, like the next four."""
    max_resolution: int
    """The longer side is first reduced to this, in pixels."""
    jpeg_quality: int
    background: str | None = None
    """The colour behind transparent pixels, #rrggbb; None gives each the colour that is stored for it."""
    exif_rotate: bool = False
    """Whether images are turned as their EXIF orientation says."""

    @staticmethod
    def of(manifest: Manifest, image_size: int, augmentation: str) -> Preprocessing:
        """That of the images of a test file."""
        keys = ("image_mode", "max_resolution", "jpeg_quality", "background", "exif_rotate")
        stored = {key: getattr(manifest, key) for key in keys}
        return Preprocessing(image_size=image_size, augmentation=augmentation, **stored)

    def __call__(self, image: Image.Image | str | Path) -> torch.Tensor:
        """A PIL image, or the path of an image file -> float32 [3, image_size, image_size] in [0, 1].

        Errors: DataError naming the file if it cannot be read or decoded.
        """
        path = None if isinstance(image, Image.Image) else Path(image)
        if path is not None and path.exists() and not path.is_file():  # a FIFO would be waited for
            raise DataError(f"{path} is not an image file")
        rendering = Rendering(parse_colour(self.background) if self.background else None, self.exif_rotate)
        try:
            if isinstance(image, Image.Image):
                pixels = rgb_pixels(image, rendering)
            else:
                pixels, _ = read_image(Path(image), rendering)
        except (OSError, BrokenImage) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else error
            raise DataError(f"{path or 'the image'} cannot be read: {reason}") from None
        return torch.from_numpy(self.pixels(pixels)).permute(2, 0, 1).float().div(255.0)

    def pixels(self, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """uint8 [height, width, 3] -> uint8 [image_size, image_size, 3]."""
        pixels = np.ascontiguousarray(fit_longer_side(pixels, self.max_resolution))
        height, width = pixels.shape[:2]
        stored, mode = pixels.reshape(-1), MODE_RAW
        if self.image_mode == "jpg":
            stored, mode = self._compressed(pixels), MODE_JPEG
        table = np.array([[mode, height, width, 0, stored.size, 0]], np.int64)
        crops = evaluation_crops(self.augmentation, np.array([height]), np.array([width]), self.image_size)
        images, status = np.empty((1, self.image_size, self.image_size, 3), np.uint8), np.zeros(1, np.int32)
        decode_uncompiled(stored, table, crops, np.empty(pixels.size, np.uint8), images, status)
        assert not status.any()  # what was just compressed can be decompressed
        return images[0]

    def _compressed(self, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """As FFCV's RGBImageField compresses an image."""
        options = [int(cv2.IMWRITE_JPEG_QUALITY), self.jpeg_quality]
        is_done, stored = cv2.imencode(".jpg", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR), options)
        assert is_done
        return stored.reshape(-1).view(np.uint8)

    def to_json(self) -> dict[str, Any]:
        return self.model_dump()
