"""One split of a data set: what it consists of, and what every reader needs to list one.

The readers are the modules beside this one, and `registry` chooses among them; `extra_images` adds to one.
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
    """What to call image i in a message: its path below `location`, or its place in a file of many images."""
    sha256: str
    """Over the names and sizes of the source files, or over their content; over choice and extra images, too."""
    read: Callable[[int], tuple[NDArray[np.uint8], str]]
    """Image i as (pixels uint8 [height, width, 3], kind); OSError or BrokenImage as `images.read_image`."""
    authors_md5: dict[str, bool] = field(default_factory=dict)
    """Source file -> whether its MD5 is the one its authors published; files without a published one are not here."""
    chosen_from: tuple[str, ...] | None = None
    """All classes of the data set, by their labels there, where `class_names` is a choice of them."""
    num_extra: int = 0
    """How many of the images, the last ones, are not the data set's own."""
    extra_location: str | None = None


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


def some(names: Sequence[str]) -> str:
    """The first ten of many names, for a message."""
    shown = ", ".join(names[:10]) or "none"
    return f"{shown} and {len(names) - 10} more" if len(names) > 10 else shown


def entry(contents: dict[str, Any], key: str, path: str | Path) -> Any:
    """contents[key] of a file that holds several arrays. Errors: DataError naming file and key."""
    if key not in contents:
        raise DataError(f"{path} has no entry {key!r}, only {', '.join(map(str, contents))}; is it the authors' file?")
    return contents[key]


def images_of(value: object, shape: tuple[int | None, ...], path: str | Path) -> NDArray[np.uint8]:
    """An array uint8 [n, *shape], None being any size. Errors: DataError naming the file and what it holds instead."""
    if isinstance(value, np.ndarray) and value.dtype == np.uint8 and value.ndim == len(shape) + 1:
        fits = all(wanted in (None, size) for wanted, size in zip(shape, value.shape[1:], strict=True))
        if fits and value.size:
            return value
    found = f"{value.dtype} {list(value.shape)}" if isinstance(value, np.ndarray) else type(value).__name__
    expected = ", ".join(str(size or "any") for size in shape)
    raise DataError(f"{path}: images are {found}, expected uint8 [n, {expected}]; is it the authors' file?")


def labels_of(value: object, count: int, num_classes: int, path: str | Path) -> NDArray[np.int64]:
    """A list or array of labels as int64 [count]. Errors: DataError naming the file and the first wrong one."""
    try:
        labels = np.asarray(value)
    except (ValueError, OverflowError):
        raise DataError(f"{path}: labels are no list of numbers") from None
    if labels.shape != (count,) or labels.dtype.kind not in "iu":
        raise DataError(f"{path}: labels are {labels.dtype} {list(labels.shape)}, expected integers [{count}]")
    outside = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if len(outside):
        first = int(outside[0])
        raise DataError(f"{path}: label {labels[first]} of image {first} is none of the {num_classes} classes")
    return labels.astype(np.int64)


def choose_classes(source: Source, classes: Sequence[str]) -> Source:
    """Only the images of `classes`, in their order; class classes[i] gets label i.

    Errors: DataError for fewer than two classes, one named twice, one that is unknown or has no images here.
    """
    label_of = {name: label for label, name in enumerate(source.class_names)}
    unknown = [name for name in classes if name not in label_of]
    if unknown:
        raise DataError(f"--classes: {source.dataset} has no class {some(unknown)}; it has {some(source.class_names)}")
    if len(classes) < 2 or len(set(classes)) < len(classes):
        raise DataError(f"--classes {','.join(classes)}: name two or more different classes")
    new_label = np.full(len(source.class_names), -1, np.int64)
    new_label[[label_of[name] for name in classes]] = np.arange(len(classes))
    labels = new_label[source.labels]
    chosen = np.flatnonzero(labels >= 0)
    own = chosen < len(labels) - source.num_extra
    absent = [name for label, name in enumerate(classes) if label not in labels[chosen[own]]]
    if absent:
        raise DataError(f"{source.location}: the {source.split} split has no images of {some(absent)}")
    return replace(
        source,
        class_names=tuple(classes),
        labels=labels[chosen],
        names=[source.names[i] for i in chosen],
        sha256=listing_sha256([(source.sha256, len(classes)), *((name, label_of[name]) for name in classes)]),
        read=lambda i: source.read(int(chosen[i])),
        chosen_from=source.class_names,
        num_extra=int((~own).sum()),
    )


def open_tar_gz(path: Path) -> tarfile.TarFile:
    """A tar.gz in memory. Errors: OSError, EOFError, zlib.error or tarfile.TarError.

    Unpacked whole, so that its checksum is compared: tarfile would stop at the end of the last file that is asked for.
    """
    return tarfile.open(fileobj=io.BytesIO(gzip.decompress(path.read_bytes())), mode="r:")


def md5_of(path: Path) -> str:
    """MD5 of a file as hexadecimal digits: what the authors of data sets publish. Errors: OSError."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def cache_folder() -> Path:
    """Where downloaded files are kept: hydra-pipeline in the user's cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hydra-pipeline"


def download(url: str, file_name: str, md5: str) -> Path:
    """The file in the cache, fetched by torchvision unless it is there, and compared with its MD5.

    Errors: DataError that says which file to put where.
    """
    # Imported here, as it brings torch and is needed at most once per machine.
    from torchvision.datasets.utils import download_url

    cache = cache_folder()
    try:
        download_url(url, str(cache), file_name, md5)
    except (OSError, RuntimeError) as error:
        raise DataError(
            f"{file_name} could not be downloaded ({error}); get it from {url} and put it into {cache}, "
            "or into another folder named with --source"
        ) from None
    return cache / file_name


SPLITS = ("train", "test")
"""What the two FFCV files are called; `FOLDERS` says what an image folder calls them."""
