"""Any folder tree with one folder per class: `train/<class>/<image>` and `val/<class>/<image>`."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from pipeline.data.manifest import DataError
from pipeline.data.sources.decode import read_image
from pipeline.data.sources.source import SPLITS, Source, listing_sha256, name_list

FOLDERS = {"train": "train", "test": "val"}


EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
"""torchvision's, compared without case; files with other extensions are ignored."""


def image_root(source: Path | None) -> Path:
    """Check that `source` holds train/ and val/ with the same classes. Errors: DataError."""
    if source is None:
        raise DataError("image_folder needs --source DIR, the folder that holds train/ and val/")
    train, val = (set(class_folders(source / FOLDERS[split])) for split in SPLITS)
    if train != val:
        only_train, only_val = sorted(train - val), sorted(val - train)
        raise DataError(
            f"{source}: train/ and val/ must have the same classes; only in train/: {name_list(only_train)}; "
            f"only in val/: {name_list(only_val)}"
        )
    return source


def class_folders(folder: Path) -> list[str]:
    """Names of the class folders, sorted: a class's label is its index in this list. Errors: DataError."""
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder; image_folder expects train/ and val/, each with a folder per class")
    with os.scandir(folder) as entries:
        classes = sorted(entry.name for entry in entries if entry.is_dir())
    if not classes:
        raise DataError(f"{folder} has no class folders; images must be at {folder.name}/<class>/<image>")
    return classes


def image_folder(dataset: str, root: Path, split: str) -> Source:
    folder = root / FOLDERS[split]
    classes = class_folders(folder)
    names: list[str] = []
    sizes: list[int] = []
    labels: list[int] = []
    empty: list[str] = []
    for label, name in enumerate(classes):
        images = sorted(_images_below(folder / name))
        if not images:
            empty.append(name)
        names.extend(os.path.relpath(path, folder) for path, _ in images)
        sizes.extend(size for _, size in images)
        labels.extend([label] * len(images))
    if empty:
        raise DataError(
            f"{folder}: no images in {len(empty)} of {len(classes)} classes: {name_list(empty)}; "
            f"remove these folders or add images ({', '.join(EXTENSIONS)})"
        )
    return Source(
        dataset=dataset,
        split=split,
        location=str(folder.resolve()),
        class_names=tuple(classes),
        labels=np.array(labels, np.int64),
        names=names,
        sha256=listing_sha256(zip(names, sizes, strict=True)),
        read=lambda i: read_image(folder / names[i]),
    )


def _images_below(folder: Path) -> Iterable[tuple[str, int]]:
    for parent, _, files in os.walk(folder, followlinks=True, onerror=_raise_data_error):
        for name in files:
            if name.lower().endswith(EXTENSIONS):
                path = os.path.join(parent, name)
                yield path, os.path.getsize(path) if os.path.exists(path) else -1


def _raise_data_error(error: OSError) -> None:
    """By default os.walk skips folders that it cannot list."""
    raise DataError(f"{error.filename} cannot be listed: {error.strerror}")
