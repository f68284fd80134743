"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009) as their authors distribute them: pickles of Python 2 in a tar.gz.

A batch holds `data`, uint8 [n, 3072]: the red plane of 32 x 32 pixels, the green, the blue; and a list of labels. Reads
the folder that the archive unpacks to, or the archive itself without unpacking it.
"""

from __future__ import annotations

import hashlib
import io
import tarfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.data.manifest import DataError
from pipeline.data.sources.safe_pickle import read_pickle
from pipeline.data.sources.source import (
    Source,
    arrays_sha256,
    download,
    entry,
    images_of,
    labels_of,
    open_tar_gz,
)


@dataclass(frozen=True)
class Layout:
    """Names of the files of one of the two data sets, and of the entries inside them."""

    archive: str
    archive_md5: str
    folder: str
    splits: dict[str, tuple[str, ...]]
    meta: str
    labels: str
    names: str
    md5: dict[str, str]
    """By file, as torchvision publishes them for the authors' files."""

    @property
    def url(self) -> str:
        return f"https://www.cs.toronto.edu/~kriz/{self.archive}"


LAYOUTS = {
    "cifar10": Layout(
        archive="cifar-10-python.tar.gz",
        archive_md5="c58f30108f718f92721af3b95e74349a",
        folder="cifar-10-batches-py",
        splits={"train": tuple(f"data_batch_{n}" for n in range(1, 6)), "test": ("test_batch",)},
        meta="batches.meta",
        labels="labels",
        names="label_names",
        md5={
            "data_batch_1": "c99cafc152244af753f735de768cd75f",
            "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
            "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
            "data_batch_4": "634d18415352ddfa80567beed471001a",
            "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
            "test_batch": "40351d587109b95175f43aff81a1287e",
            "batches.meta": "5ff9c542aee3614f3951f8cda6e48888",
        },
    ),
    "cifar100": Layout(
        archive="cifar-100-python.tar.gz",
        archive_md5="eb9058c3a382ffc7106e4002c42a8d85",
        folder="cifar-100-python",
        splits={"train": ("train",), "test": ("test",)},
        meta="meta",
        labels="fine_labels",
        names="fine_label_names",
        md5={
            "train": "16019d7e3df5f24257cddd939b257f8d",
            "test": "f0ef6b0ae62326f3e7ffdfab6717acfc",
            "meta": "7973b15100ade9c7d40fb424638fde48",
        },
    ),
}


def cifar(dataset: str, split: str, source: Path | None) -> Source:
    """One split of `cifar10` or `cifar100` (its 100 fine classes), images in the order of the files.

    `source` is the archive, the folder it unpacks to, or one that holds either; None downloads. Errors: DataError.
    """
    layout = LAYOUTS[dataset]
    place = _find_files(layout, source)
    batches = layout.splits[split]
    files = _read_files(layout, place, (*batches, layout.meta))
    contents = {name: read_pickle(io.BytesIO(data), place / name) for name, data in files.items()}
    class_names = tuple(entry(contents[layout.meta], layout.names, place / layout.meta))
    pixels = [images_of(entry(contents[name], "data", place / name), (3072,), place / name) for name in batches]
    labels = np.concatenate(
        [
            labels_of(entry(contents[name], layout.labels, place / name), len(data), len(class_names), place / name)
            for name, data in zip(batches, pixels, strict=True)
        ]
    )
    images = np.concatenate(pixels).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return Source(
        dataset=dataset,
        split=split,
        location=str(place.resolve()),
        class_names=class_names,
        labels=labels,
        names=[f"{name}[{i}]" for name, data in zip(batches, pixels, strict=True) for i in range(len(data))],
        sha256=arrays_sha256(*pixels, labels),
        read=lambda i: (np.ascontiguousarray(images[i]), ()),
        authors_md5={
            name: hashlib.md5(data, usedforsecurity=False).hexdigest() == layout.md5[name]
            for name, data in files.items()
        },
    )


def _find_files(layout: Layout, source: Path | None) -> Path:
    """The path of the archive, or of the folder with the batches."""
    if source is None:
        return download(layout.url, layout.archive, layout.archive_md5)
    for place in (source / layout.folder, source):
        if (place / layout.meta).is_file():
            return place
    archive = source if source.is_file() else source / layout.archive
    if not archive.is_file():
        raise DataError(
            f"{source} holds neither {layout.archive} nor the folder {layout.folder} that it unpacks to; "
            f"get it from {layout.url}"
        )
    return archive


def _read_files(layout: Layout, place: Path, names: tuple[str, ...]) -> dict[str, bytes]:
    try:
        files = _archive_files(place, layout.folder, names) if place.is_file() else _folder_files(place, names)
    except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
        raise DataError(f"{place} cannot be read: {error}; get it again from {layout.url}") from None
    missing = [name for name in names if name not in files]
    if missing:
        raise DataError(f"{place} lacks {', '.join(missing)}; get it again from {layout.url}")
    return files


def _folder_files(folder: Path, names: tuple[str, ...]) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in names if (folder / name).is_file()}


def _archive_files(archive: Path, folder: str, names: tuple[str, ...]) -> dict[str, bytes]:
    name_of_member = {f"{folder}/{name}": name for name in names}
    files: dict[str, bytes] = {}
    with open_tar_gz(archive) as tar:
        for member in tar:
            if member.isreg() and member.name in name_of_member and (stream := tar.extractfile(member)) is not None:
                files[name_of_member[member.name]] = stream.read()
    return files
