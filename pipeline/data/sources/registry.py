"""Where images come from: the data sets there are, Fashion-MNIST's idx files, any tree with one folder per class.

A `Source` lists one split; sample i is always the same image: of a folder, files are sorted by class and then by name;
of a file of many images, they keep its order. What is decoded from a file, and how, is `pipeline.data.sources.decode`.
"""

from __future__ import annotations

import gzip
import hashlib
import math
import os
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.data.manifest import DataError
from pipeline.data.sources.cifar import LAYOUTS, cifar
from pipeline.data.sources.decode import read_image
from pipeline.data.sources.extra_images import add_extra
from pipeline.data.sources.imagenet import imagenet
from pipeline.data.sources.source import Source, cache_folder, choose_classes, listing_sha256, some
from pipeline.data.sources.svhn import svhn
from pipeline.recipe.sections import DATASETS

SPLITS = ("train", "test")
"""What the two FFCV files are called; `FOLDERS` says what an image folder calls them."""
FOLDERS = {"train": "train", "test": "val"}
EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
"""torchvision's, compared without case; other files of the tree are not images and are passed over."""

DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
IDX_FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
FASHION_CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)


def open_source(
    dataset: str, split: str, source: Path | None, classes: Sequence[str] = (), extra: Path | None = None
) -> Source:
    """List one split; `source` may be None for data sets that can be had without.

    `classes` leaves the others out and numbers these in the order given; none means all. The images of the file
    `extra` come behind the training images. Errors: DataError naming the place and the fix.
    """
    if split not in SPLITS:
        raise DataError(f"split {split!r} is none of {', '.join(SPLITS)}")
    try:
        opened = _open_whole(dataset, split, source)
        if extra is not None and split == "train":
            opened = add_extra(opened, extra)
    except OSError as error:
        raise DataError(f"{error.filename or source or dataset} cannot be read: {error.strerror or error}") from None
    return choose_classes(opened, classes) if classes else opened


def _open_whole(dataset: str, split: str, source: Path | None) -> Source:
    if dataset == "fashion_mnist":
        return _fashion_mnist(find_fashion_mnist(source), split)
    if dataset in LAYOUTS:
        return cifar(dataset, split, source)
    if dataset == "svhn":
        return svhn(split, source)
    if dataset == "imagenet" and not (source is not None and (source / FOLDERS["train"]).is_dir()):
        return imagenet(split, source)
    if dataset in ("image_folder", "imagenet"):
        return _image_folder(dataset, image_root(source), split)
    raise DataError(f"data set {dataset!r} is none of {', '.join(DATASETS)}")


def image_root(source: Path | None) -> Path:
    """Check that `source` holds train/ and val/ with the same classes. Errors: DataError."""
    if source is None:
        raise DataError("image_folder needs --source DIR, the folder that holds train/ and val/")
    train, val = (set(class_folders(source / FOLDERS[split])) for split in SPLITS)
    if train != val:
        only_train, only_val = sorted(train - val), sorted(val - train)
        raise DataError(
            f"{source}: train/ and val/ must have the same classes; only in train/: {some(only_train)}; "
            f"only in val/: {some(only_val)}"
        )
    return source


def class_folders(folder: Path) -> list[str]:
    """Names of the class folders, sorted: the label of a class is its place in this list. Errors: DataError."""
    if not folder.is_dir():
        raise DataError(f"{folder} is no folder; image_folder expects train/ and val/, each with one folder per class")
    with os.scandir(folder) as entries:
        classes = sorted(entry.name for entry in entries if entry.is_dir())
    if not classes:
        raise DataError(f"{folder} holds no class folders; images must lie in {folder.name}/<class>/<image>")
    return classes


def _image_folder(dataset: str, root: Path, split: str) -> Source:
    folder = root / FOLDERS[split]
    classes = class_folders(folder)
    names: list[str] = []
    sizes: list[int] = []
    labels: list[int] = []
    empty: list[str] = []
    for label, name in enumerate(classes):
        found = sorted(_images_below(folder / name))
        if not found:
            empty.append(name)
        names.extend(os.path.relpath(path, folder) for path, _ in found)
        sizes.extend(size for _, size in found)
        labels.extend([label] * len(found))
    if empty:
        raise DataError(
            f"{folder}: no images in {len(empty)} of {len(classes)} classes: {some(empty)}; "
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
    for place, _, files in os.walk(folder, followlinks=True, onerror=_raise):
        for name in files:
            if name.lower().endswith(EXTENSIONS):
                path = os.path.join(place, name)
                yield path, os.path.getsize(path) if os.path.exists(path) else -1


def _raise(error: OSError) -> None:
    """os.walk passes over folders that it cannot list, unless told otherwise."""
    raise DataError(f"{error.filename} cannot be listed: {error.strerror}")


def find_fashion_mnist(source: Path | None) -> Path:
    """The folder with the four idx files: `source`, else Debian's package, else a download into the user's cache."""
    if source is not None:
        missing = [name for pair in IDX_FILES.values() for name in pair if _idx_file(source, name) is None]
        if missing:
            raise DataError(f"{source} lacks {', '.join(missing)} (each may end in .gz)")
        return source
    if DEBIAN_FASHION_MNIST.is_dir():
        return DEBIAN_FASHION_MNIST
    return _download_fashion_mnist()


def _download_fashion_mnist() -> Path:
    cache = cache_folder()
    # Imported here, as it brings torch and is needed at most once per machine.
    from torchvision.datasets import FashionMNIST

    try:
        FashionMNIST(str(cache), train=True, download=True)
    except (OSError, RuntimeError) as error:
        raise DataError(
            f"Fashion-MNIST could not be downloaded into {cache}: {error}; either install Debian's package "
            "dataset-fashion-mnist, or put the four idx files into a folder and name it with --source"
        ) from None
    return cache / "FashionMNIST" / "raw"


def _idx_file(folder: Path, name: str) -> Path | None:
    return next((path for path in (folder / f"{name}.gz", folder / name) if path.is_file()), None)


def read_idx(folder: Path, name: str, dimensions: int) -> NDArray[np.uint8]:
    """An idx file of unsigned bytes, plain or gzipped, as an array of 1 or 3 dimensions. Errors: DataError.

    Format: two zero bytes, 8 for unsigned bytes, the number of dimensions, each one as big-endian uint32, the data.
    """
    path = _idx_file(folder, name)
    if path is None:
        raise DataError(f"{folder} lacks {name} (it may end in .gz)")
    try:
        data = path.read_bytes()
        if path.suffix == ".gz":
            data = gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {error}") from None
    start = 4 + 4 * dimensions
    if data[:4] != bytes([0, 0, 8, dimensions]) or len(data) < start:
        raise DataError(f"{path} is no idx file of {dimensions} dimensions of unsigned bytes")
    shape = tuple(int(size) for size in np.frombuffer(data, ">u4", dimensions, 4))
    if len(data) != start + math.prod(shape):
        raise DataError(f"{path} has {len(data) - start} bytes of data where its header says {shape}; get it again")
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)


def _fashion_mnist(folder: Path, split: str) -> Source:
    image_file, label_file = IDX_FILES[split]
    images, labels = read_idx(folder, image_file, 3), read_idx(folder, label_file, 1)
    if len(images) != len(labels) or labels.max(initial=0) >= len(FASHION_CLASSES) or not len(images):
        raise DataError(f"{folder}: {image_file} and {label_file} do not belong together, or hold no Fashion-MNIST")
    digest = hashlib.sha256(images.tobytes() + labels.tobytes())
    return Source(
        dataset="fashion_mnist",
        split=split,
        location=str(folder.resolve()),
        class_names=FASHION_CLASSES,
        labels=labels.astype(np.int64),
        names=[f"{image_file}[{i}]" for i in range(len(images))],
        sha256=digest.hexdigest(),
        read=lambda i: (np.repeat(images[i][:, :, None], 3, axis=2), "grey"),
    )
