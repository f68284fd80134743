"""Extra training images with pseudo-labels, from the files in which they are published.

They are written after the data set's own images, into the same file; the manifest says how many there are. Their share
of a batch is the recipe's `data.extra_fraction`, which `pipeline.data.loading.sampling` implements.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.data.manifest import DataError
from pipeline.data.sources.safe_pickle import read_pickle
from pipeline.data.sources.source import Source, arrays_sha256, entry, images_of, labels_of, listing_sha256
from pipeline.data.sources.svhn import read_digits

PICKLE_KEYS = ("data", "extrapolated_targets")
"""Carmon et al. 2019, section 5: 500,000 images of Tiny Images, ti_500K_pseudo_labeled.pickle."""
NPZ_KEYS = ("image", "label")
"""Generated images, as Gowal et al. 2021 publish them."""


def add_extra(source: Source, path: Path) -> Source:
    """`source` followed by the images of `path`. Labels refer to all classes of the data set.

    Errors: DataError naming the file and what is wrong with it.
    """
    images, labels = read_extra(path, len(source.class_names))
    own = len(source.labels)
    content = arrays_sha256(images, labels)
    return replace(
        source,
        labels=np.concatenate([source.labels, labels]),
        names=[*source.names, *(f"{path.name}[{i}]" for i in range(len(labels)))],
        sha256=listing_sha256([(source.sha256, own), (content, len(labels))]),
        read=lambda i: source.read(i) if i < own else (np.ascontiguousarray(images[i - own]), ()),
        num_extra=len(labels),
        extra_location=str(path.resolve()),
    )


def read_extra(path: Path, num_classes: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Images [n, height, width, 3] and labels [n] of a .pickle, .npz, or SVHN .mat file. Errors: DataError."""
    if not path.is_file():
        raise DataError(f"--extra {path}: no such file")
    if path.suffix == ".mat":
        return read_digits(path)
    if path.suffix == ".pickle":
        keys = PICKLE_KEYS
        with path.open("rb") as stream:
            contents = read_pickle(stream, path)
    elif path.suffix == ".npz":
        keys, contents = NPZ_KEYS, _read_npz(path)
    else:
        raise DataError(
            f"--extra {path}: expected a .pickle ({', '.join(PICKLE_KEYS)}), .npz ({', '.join(NPZ_KEYS)}) or .mat"
        )
    images = images_of(entry(contents, keys[0], path), (None, None, 3), path)
    return images, labels_of(entry(contents, keys[1], path), len(images), num_classes, path)


def _read_npz(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            return {key: file[key] for key in NPZ_KEYS if key in file.files}
    except Exception as error:
        # For a damaged file zipfile, zlib and numpy raise many types; numpy refuses arrays of objects.
        raise DataError(f"{path} cannot be read: {type(error).__name__}: {error}") from None
