"""Any folder tree with one folder per class: `train/<class>/<image>` and `val/<class>/<image>`.

Hidden files and folders, and those that programs leave behind, are passed over and counted; so are files that are no
images by their extension. Without val/, a share of every class's images can be held out as the test set.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np

from pipeline import rng
from pipeline.data.manifest import DataError
from pipeline.data.sources.decode import AS_STORED, Rendering, read_image, reads_heif
from pipeline.data.sources.source import SPLITS, Source, listing_sha256, name_list

FOLDERS = {"train": "train", "test": "val"}


EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".gif")
"""torchvision's and GIF, compared without case."""
HEIF_EXTENSIONS = (".heic", ".heif")
"""Read where pillow-heif is installed."""
SERVICE_FOLDERS = frozenset(
    {
        "@eaDir",
        "#recycle",
        "$RECYCLE.BIN",
        "System Volume Information",
        "__MACOSX",
        "__pycache__",
        "lost+found",
    }
)
"""Folders of storage devices, systems and programs, which may hold thumbnails; hidden ones begin with a dot."""


@dataclass(frozen=True)
class FolderOptions:
    """How a tree of one's own images is read."""

    rendering: Rendering = AS_STORED
    val_fraction: Fraction | None = None
    """Share of every class's images that are held out as the test set, for a tree without val/."""

    def __post_init__(self) -> None:
        if self.val_fraction is not None and not 0 < self.val_fraction < 1:
            raise DataError(f"--val-fraction {self.val_fraction} must lie between 0 and 1, for example 0.2")


AS_PUBLISHED = FolderOptions()


def image_folder(dataset: str, root: Path | None, split: str, options: FolderOptions) -> Source:
    """One split of the tree `root`. Errors: DataError naming the folder and the fix."""
    if root is None:
        raise DataError("image_folder needs --source DIR, the folder that holds train/ and val/")
    folder, classes = _folder_of(dataset, root, split, options)
    passed_over = Counter(f"{name}/" for name in _entries(folder, folders=True) if _is_service(name))
    passed_over.update("files beside the class folders" for _ in _entries(folder, folders=False))
    names: list[str] = []
    sizes: list[int] = []
    labels: list[int] = []
    empty: list[str] = []
    for label, name in enumerate(classes):
        images = sorted(_images_below(folder / name, passed_over))
        if images and options.val_fraction is not None:
            images = _share_of(images, folder, name, split, options.val_fraction)
        if not images:
            empty.append(name)
        names.extend(os.path.relpath(path, folder) for path, _ in images)
        sizes.extend(size for _, size in images)
        labels.extend([label] * len(images))
    if empty:
        raise DataError(
            f"{folder}: no images in {len(empty)} of {len(classes)} classes: {name_list(empty)}; "
            f"remove these folders or add images ({', '.join(_extensions())})"
        )
    return Source(
        dataset=dataset,
        split=split,
        location=str(folder.resolve()),
        class_names=tuple(classes),
        labels=np.array(labels, np.int64),
        names=names,
        sha256=listing_sha256(zip(names, sizes, strict=True)),
        read=lambda i: read_image(folder / names[i], options.rendering),
        passed_over=dict(sorted(passed_over.items())),
    )


def _folder_of(dataset: str, root: Path, split: str, options: FolderOptions) -> tuple[Path, list[str]]:
    """The folder with a split's classes, and their names. Errors: DataError."""
    train, val = (root / FOLDERS[name] for name in SPLITS)
    if options.val_fraction is not None:
        if val.is_dir():
            raise DataError(f"--val-fraction {options.val_fraction}: {root} has val/ already; leave the option out")
        folder = train if train.is_dir() else root
        return folder, class_folders(folder)
    classes = class_folders(train)
    if dataset == "image_folder" and not val.is_dir():
        raise DataError(f"{val} is not a folder; --val-fraction 0.2 holds out a fifth of every class as the test set")
    in_val = set(class_folders(val))
    if set(classes) != in_val:
        only_train, only_val = sorted(set(classes) - in_val), sorted(in_val - set(classes))
        raise DataError(
            f"{root}: train/ and val/ must have the same classes; only in train/: {name_list(only_train)}; "
            f"only in val/: {name_list(only_val)}"
        )
    return root / FOLDERS[split], classes


def class_folders(folder: Path) -> list[str]:
    """Names of the class folders, sorted: a class's label is its index in this list. Errors: DataError."""
    if not folder.is_dir():
        raise DataError(
            f"{folder} is not a folder; image_folder expects train/ and val/, each with a folder per class, or with "
            "--val-fraction a folder per class"
        )
    classes = [name for name in _entries(folder, folders=True) if not _is_service(name)]
    if not classes:
        raise DataError(f"{folder} has no class folders; images must be at {folder.name}/<class>/<image>")
    for name in classes:
        try:
            name.encode()
        except UnicodeEncodeError:
            raise DataError(f"{folder}: the name of class folder {_text(name)} is not UTF-8; rename it") from None
    return classes


def _text(name: str) -> str:
    """A file name that can be encoded: bytes that are not UTF-8 as in \\xe9."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _entries(folder: Path, *, folders: bool) -> list[str]:
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir() == folders)


def _is_service(name: str) -> bool:
    return name.startswith(".") or name in SERVICE_FOLDERS


def _extensions() -> tuple[str, ...]:
    return EXTENSIONS + HEIF_EXTENSIONS if reads_heif() else EXTENSIONS


def _images_below(folder: Path, passed_over: Counter[str]) -> Iterator[tuple[str, int]]:
    """(path, bytes) of the images of a class; counts what is passed over by extension or name."""
    extensions = _extensions()
    for parent, folders, files in os.walk(folder, followlinks=True, onerror=_raise_data_error):
        passed_over.update(f"{name}/" for name in folders if _is_service(name))
        folders[:] = [name for name in folders if not _is_service(name)]
        for name in files:
            if name.startswith("."):
                passed_over["hidden files"] += 1
            elif name.lower().endswith(extensions):
                path = os.path.join(parent, name)
                yield path, os.path.getsize(path) if os.path.exists(path) else -1
            else:
                passed_over[os.path.splitext(name)[1].lower() or "files without an extension"] += 1


def _share_of(
    images: list[tuple[str, int]], folder: Path, class_name: str, split: str, val_fraction: Fraction
) -> list[tuple[str, int]]:
    """The images of a class that belong to a split, in the given order.

    An image's key is made from its path alone, so that a tree is always split in the same way, and added images leave
    nearly all others where they are. Errors: DataError for a class of one image.
    """
    if len(images) < 2:
        raise DataError(f"{folder / class_name} has one image, too few for a training and a test set; add images")
    keys = [rng.scope_key(0, "val_fraction", _text(os.path.relpath(path, folder))) for path, _ in images]
    count = min(max(1, int(len(images) * val_fraction + Fraction(1, 2))), len(images) - 1)
    held_out = set(sorted(range(len(images)), key=keys.__getitem__)[:count])
    return [image for i, image in enumerate(images) if (i in held_out) == (split == "test")]


def _raise_data_error(error: OSError) -> None:
    """By default os.walk skips folders that it cannot list."""
    raise DataError(f"{error.filename} cannot be listed: {error.strerror}")
