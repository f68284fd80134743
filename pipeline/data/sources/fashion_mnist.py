"""Fashion-MNIST (Xiao et al. 2017): four idx files, from a folder, Debian's package or a download."""

from __future__ import annotations

import hashlib
import math
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.data.manifest import DataError
from pipeline.data.sources.source import Source, cache_folder, gunzip

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
    # Imported here, as it imports torch and is needed at most once per machine.
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
        data = gunzip(path) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {error}") from None
    start = 4 + 4 * dimensions
    if data[:4] != bytes([0, 0, 8, dimensions]) or len(data) < start:
        raise DataError(f"{path} is not an idx file of {dimensions} dimensions of unsigned bytes")
    shape = tuple(int(size) for size in np.frombuffer(data, ">u4", dimensions, 4))
    if len(data) != start + math.prod(shape):
        raise DataError(f"{path} has {len(data) - start} bytes of data, but its header says {shape}; get it again")
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)


def fashion_mnist(folder: Path, split: str) -> Source:
    image_file, label_file = IDX_FILES[split]
    images, labels = read_idx(folder, image_file, 3), read_idx(folder, label_file, 1)
    if len(images) != len(labels) or labels.max(initial=0) >= len(FASHION_CLASSES) or not len(images):
        raise DataError(f"{folder}: {image_file} and {label_file} do not match, or are not Fashion-MNIST")
    digest = hashlib.sha256(images.tobytes() + labels.tobytes())
    return Source(
        dataset="fashion_mnist",
        split=split,
        location=str(folder.resolve()),
        class_names=FASHION_CLASSES,
        labels=labels.astype(np.int64),
        names=[f"{image_file}[{i}]" for i in range(len(images))],
        sha256=digest.hexdigest(),
        read=lambda i: (np.repeat(images[i][:, :, None], 3, axis=2), ("grey",)),
    )
