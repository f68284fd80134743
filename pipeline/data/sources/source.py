"""One split of a data set, and the functions that its readers share.

The readers are the other modules of this package; `registry` chooses among them, and `extra_images` adds to a source.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import tarfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.data.manifest import DataError

MOST_UNCOMPRESSED_BYTES = 1 << 30
"""CIFAR's archives hold less than 200 MB; a file of 1 MB can hold 1 GB of zeros."""


@dataclass(frozen=True)
class Source:
    """One split of a data set, listed but not read."""

    dataset: str
    split: str
    location: str
    class_names: tuple[str, ...]
    labels: NDArray[np.int64]
    """Shape [n], in [0, len(class_names))."""
    names: list[str]
    """Image i's name in messages: its path below `location`, or its index in a file of many images."""
    sha256: str
    """Over the names and sizes of the source files, or their content, and over chosen classes and extra images."""
    read: Callable[[int], tuple[NDArray[np.uint8], tuple[str, ...]]]
    """Image i as (pixels uint8 [height, width, 3], kinds), see `decode.decode_rgb`. Errors: those of `read_image`."""
    authors_md5: dict[str, bool] = field(default_factory=dict)
    """Source file -> whether its MD5 is the one its authors published; omits files without a published MD5."""
    chosen_from: tuple[str, ...] | None = None
    """All classes of the data set, by their original labels, if `class_names` is a subset of them."""
    num_extra: int = 0
    """How many of the images, the last ones, are extra ones and not the data set's own."""
    extra_location: str | None = None
    passed_over: dict[str, int] = field(default_factory=dict)
    """Number of files and folders of a tree that are not read, by kind: '.heic', '@eaDir/', 'hidden files'."""


def listing_sha256(entries: Iterable[tuple[str, int]]) -> str:
    """Hash of (name, bytes) pairs in the given order."""
    digest = hashlib.sha256()
    for name, size in entries:
        digest.update(f"{name}\0{size}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def arrays_sha256(*arrays: NDArray[np.generic]) -> str:
    """Hash of the content of arrays in the given order."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def name_list(names: Sequence[str]) -> str:
    """Up to ten of the names, for a message."""
    first = ", ".join(names[:10]) or "none"
    return f"{first} and {len(names) - 10} more" if len(names) > 10 else first


def entry(contents: dict[str, Any], key: str, path: str | Path) -> Any:
    """contents[key] of a file that holds several arrays. Errors: DataError naming file and key."""
    if key not in contents:
        raise DataError(f"{path} has no entry {key!r}, only {', '.join(map(str, contents))}; is it the authors' file?")
    return contents[key]


def images_of(value: object, shape: tuple[int | None, ...], path: str | Path) -> NDArray[np.uint8]:
    """`value` as uint8 [n, *shape], where None is any size. Errors: DataError naming the file and what it holds."""
    if isinstance(value, np.ndarray) and value.dtype == np.uint8 and value.ndim == len(shape) + 1:
        fits = all(expected in (None, size) for expected, size in zip(shape, value.shape[1:], strict=True))
        if fits and value.size:
            return value
    actual = f"{value.dtype} {list(value.shape)}" if isinstance(value, np.ndarray) else type(value).__name__
    expected = ", ".join(str(size or "any") for size in shape)
    raise DataError(f"{path}: images are {actual}, expected uint8 [n, {expected}]; is it the authors' file?")


def labels_of(value: object, count: int, num_classes: int, path: str | Path) -> NDArray[np.int64]:
    """A list or array of labels as int64 [count]. Errors: DataError naming the file and the first wrong label."""
    try:
        labels = np.asarray(value)
    except (ValueError, OverflowError):
        raise DataError(f"{path}: labels are not a list of numbers") from None
    if labels.shape != (count,) or labels.dtype.kind not in "iu":
        raise DataError(f"{path}: labels are {labels.dtype} {list(labels.shape)}, expected integers [{count}]")
    outside = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if len(outside):
        first = int(outside[0])
        raise DataError(f"{path}: label {labels[first]} of image {first} is not one of the {num_classes} classes")
    return labels.astype(np.int64)


def choose_classes(source: Source, classes: Sequence[str]) -> Source:
    """The images of `classes` only, in the order of `source`; class classes[i] gets label i.

    Errors: DataError for fewer than two classes, and for one that is named twice, unknown or without images.
    """
    label_of = {name: label for label, name in enumerate(source.class_names)}
    unknown = [name for name in classes if name not in label_of]
    if unknown:
        raise DataError(
            f"--classes: {source.dataset} has no class {name_list(unknown)}; it has {name_list(source.class_names)}"
        )
    if len(classes) < 2 or len(set(classes)) < len(classes):
        raise DataError(f"--classes {','.join(classes)}: name two or more different classes")
    new_label = np.full(len(source.class_names), -1, np.int64)
    new_label[[label_of[name] for name in classes]] = np.arange(len(classes))
    labels = new_label[source.labels]
    subset = np.flatnonzero(labels >= 0)
    own = subset < len(labels) - source.num_extra
    absent = [name for label, name in enumerate(classes) if label not in labels[subset[own]]]
    if absent:
        raise DataError(f"{source.location}: the {source.split} split has no images of {name_list(absent)}")
    return replace(
        source,
        class_names=tuple(classes),
        labels=labels[subset],
        names=[source.names[i] for i in subset],
        sha256=listing_sha256([(source.sha256, len(classes)), *((name, label_of[name]) for name in classes)]),
        read=lambda i: source.read(int(subset[i])),
        chosen_from=source.class_names,
        num_extra=int((~own).sum()),
    )


def gunzip(path: Path) -> bytes:
    """The content of a .gz file. Errors: DataError if it is more than any data set's; OSError, EOFError, zlib.error.

    It is decompressed to its end, so that its checksum is compared.
    """
    with gzip.open(path) as stream:
        content = stream.read(MOST_UNCOMPRESSED_BYTES + 1)
    if len(content) > MOST_UNCOMPRESSED_BYTES:
        raise DataError(f"{path} holds more than {MOST_UNCOMPRESSED_BYTES >> 20} MiB; is it the authors' file?")
    return content


def open_tar_gz(path: Path) -> tarfile.TarFile:
    """Open a tar.gz, decompressed in memory. Errors: those of `gunzip`, or tarfile.TarError.

    tarfile itself would stop after the last file that is read, before the checksum.
    """
    return tarfile.open(fileobj=io.BytesIO(gunzip(path)), mode="r:")


def md5_of(path: Path) -> str:
    """MD5 of a file in hexadecimal, the digest that authors of data sets publish. Errors: OSError."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def cache_folder() -> Path:
    """Where downloaded files are kept: `hydra-pipeline` in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hydra-pipeline"


def download(url: str, file_name: str, md5: str) -> Path:
    """The path of a file in the cache; torchvision downloads it if it is missing, and compares its MD5.

    Errors: DataError that says which file to put where.
    """
    # Imported here, as it imports torch and is needed at most once per machine.
    from torchvision.datasets.utils import download_url

    cache = cache_folder()
    try:
        download_url(url, str(cache), file_name, md5)
    except (OSError, RuntimeError) as error:
        raise DataError(
            f"{file_name} could not be downloaded ({error}); get it from {url} and put it into {cache}, "
            "or into another folder that you pass with --source"
        ) from None
    return cache / file_name


SPLITS = ("train", "test")
"""Names of the two FFCV files; `image_folder.FOLDERS` maps them to folder names."""
