"""A tree of ImageNet's shape, small: class folders of real image files of mixed sizes, kinds and faults."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

BROKEN = {
    "truncated": lambda data: data[: len(data) * 2 // 3],
    "empty": lambda data: b"",
    "text": lambda data: b"404 not found\n",
    "zeroed": lambda data: bytes(len(data)),
}
"""Ways to break a file: what is left of its bytes."""


def class_name(label: int) -> str:
    """Like a WordNet id; sorts by label."""
    return f"n{label + 1:08d}"


def picture(rng: np.random.Generator, label: int, height: int, width: int) -> Image.Image:
    """A smooth image whose colours depend on the label, so that a network can learn it; RGB."""
    colours = np.random.default_rng(label).integers(0, 256, (2, 2, 3))
    noise = rng.integers(-40, 41, (4, 4, 3))
    coarse = np.clip(np.kron(colours, np.ones((2, 2, 1))) + noise, 0, 255).astype(np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, format: str = "JPEG") -> bytes:
    stream = io.BytesIO()
    image.save(stream, format)
    return stream.getvalue()


def make_imagenet_tree(
    folder: Path,
    num_classes: int,
    per_class: int,
    seed: int,
    val_per_class: int,
    sizes: tuple[int, int] = (65, 160),
    broken: tuple[str, ...] = (),
) -> list[Path]:
    """Write folder/train/<class>/*.JPEG and folder/val/<class>/*.JPEG; return the files that were broken on purpose.

    Sides are drawn from `sizes` in pixels, inclusive. Of every ten images of a split, in order, the second is grey, the
    fifth CMYK and the ninth a PNG, all called .JPEG. Class i of train has one file more for each i < len(broken),
    broken in the way that broken[i] names (a key of BROKEN).
    """
    rng = np.random.default_rng(seed)
    offenders = []
    for split, count in (("train", per_class), ("val", val_per_class)):
        number = 0
        for label in range(num_classes):
            place = folder / split / class_name(label)
            place.mkdir(parents=True)
            for i in range(count):
                height, width = (int(side) for side in rng.integers(sizes[0], sizes[1] + 1, 2))
                image = picture(rng, label, height, width)
                kind = number % 10
                mode = {1: "L", 4: "CMYK"}.get(kind, "RGB")
                data = encoded(image.convert(mode), "PNG" if kind == 8 else "JPEG")
                path = place / f"{class_name(label)}_{i}.JPEG"
                path.write_bytes(data)
                number += 1
    for label, way in enumerate(broken):
        path = folder / "train" / class_name(label) / f"{class_name(label)}_broken.JPEG"
        path.write_bytes(BROKEN[way](encoded(picture(rng, label, sizes[1], sizes[1]))))
        offenders.append(path)
    return offenders
