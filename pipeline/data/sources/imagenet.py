"""ImageNet (ILSVRC 2012) from the official archives, which are read in place: nothing is unpacked.

The training archive is a tar with one tar of JPEGs per class; the validation archive is a tar of JPEGs, whose classes
the devkit lists. Tars are read header by header: Python's tarfile takes a damaged header for the end, and reads on past
the end of a truncated inner archive, whereas here every archive must have a proper end.
"""

from __future__ import annotations

import io
import os
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import scipy.io
from numpy.typing import NDArray

from pipeline.data.manifest import DataError
from pipeline.data.sources.decode import decode_rgb
from pipeline.data.sources.source import Source, listing_sha256, md5_of, name_list, open_tar_gz

TRAIN = "ILSVRC2012_img_train.tar"
VAL = "ILSVRC2012_img_val.tar"
DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"
DEVKIT_MD5 = "fa75699e90414af021442c21a62c3abf"
META = "ILSVRC2012_devkit_t12/data/meta.mat"
TRUTH = "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt"
WNID = re.compile(r"n\d{8}")
BLOCK = 512


@dataclass(frozen=True, slots=True)
class Member:
    """A file inside a tar: its name, and where its bytes are in the outermost file."""

    name: str
    start: int
    size: int


def imagenet(split: str, folder: Path | None) -> Source:
    """One split of ImageNet from the three official archives in `folder`.

    Classes, order and names are those of the folder tree that they unpack to: WordNet ids, sorted, then file names.
    Errors: DataError naming the archive, the byte and the fix.
    """
    needed = (TRAIN, VAL, DEVKIT)
    if folder is None:
        raise DataError(
            f"imagenet cannot be downloaded without an account; pass with --source the folder that holds "
            f"{', '.join(needed)}, or the folder tree with train/ and val/"
        )
    missing = [name for name in needed if not (folder / name).is_file()]
    if missing:
        raise DataError(f"{folder} lacks {', '.join(missing)}, and has no folder tree with train/ and val/ either")
    wnid_of, truth = read_devkit(folder / DEVKIT)
    with (folder / TRAIN).open("rb") as stream:
        archives = sorted(_members(stream, folder / TRAIN), key=lambda member: member.name)
        classes = [_wnid(member, folder / TRAIN) for member in archives]
        if classes != sorted(wnid_of.values()):
            raise DataError(
                f"{folder}: only in {TRAIN}: {name_list(sorted(set(classes) - set(wnid_of.values())))}; "
                f"only in {DEVKIT}: {name_list(sorted(set(wnid_of.values()) - set(classes)))}; get both again"
            )
        if split == "train":
            path = folder / TRAIN
            per_class = [list(_members(stream, path, archive)) for archive in archives]
        else:
            path = folder / VAL
            per_class = _by_class(path, [wnid_of[number] for number in truth], classes)
    return _source(split, path, classes, per_class, {DEVKIT: md5_of(folder / DEVKIT) == DEVKIT_MD5})


def _source(
    split: str, path: Path, classes: list[str], per_class: list[list[Member]], authors_md5: dict[str, bool]
) -> Source:
    empty = [name for name, members in zip(classes, per_class, strict=True) if not members]
    if empty:
        raise DataError(f"{path}: no images in {len(empty)} of {len(classes)} classes: {name_list(empty)}")
    members = [member for group in per_class for member in sorted(group, key=lambda member: member.name)]
    labels = np.repeat(np.arange(len(classes), dtype=np.int64), [len(group) for group in per_class])
    names = [f"{classes[label]}/{member.name}" for label, member in zip(labels.tolist(), members, strict=True)]
    starts = np.array([member.start for member in members], np.int64)
    sizes = np.array([member.size for member in members], np.int64)

    def read(i: int) -> tuple[NDArray[np.uint8], tuple[str, ...]]:
        with path.open("rb") as stream:  # for each image, as threads and forked processes would share its position
            stream.seek(int(starts[i]))
            return decode_rgb(stream.read(int(sizes[i])))

    return Source(
        dataset="imagenet",
        split=split,
        location=str(path.resolve()),
        class_names=tuple(classes),
        labels=labels,
        names=names,
        sha256=listing_sha256(zip(names, sizes.tolist(), strict=True)),
        read=read,
        authors_md5=authors_md5,
    )


def _members(stream: BinaryIO, path: Path, inside: Member | None = None) -> Iterator[Member]:
    """The files of the tar `path`, or of the tar that is its member `inside`, in stored order."""
    size = os.fstat(stream.fileno()).st_size
    offset, end = (inside.start, inside.start + inside.size) if inside else (0, size)
    archive = f"{path}, {inside.name}" if inside else str(path)
    while True:
        header = os.pread(stream.fileno(), BLOCK, offset)
        if len(header) < BLOCK or offset + BLOCK > end:
            raise DataError(f"{archive} is truncated: it has no end mark at byte {offset}; get it again")
        if not any(header):
            return
        try:
            entry = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
        except tarfile.HeaderError as error:
            raise DataError(f"{archive} is damaged at byte {offset} ({error}); get it again") from None
        start = offset + BLOCK
        if not 0 <= entry.size <= end - start:
            raise DataError(f"{archive} is truncated inside {entry.name}; get it again")
        if not entry.isreg() or "/" in entry.name:
            raise DataError(
                f"{archive} holds {entry.name!r}, which is not a regular file: it is not the official archive"
            )
        yield Member(entry.name, start, entry.size)
        offset = start + -(-entry.size // BLOCK) * BLOCK


def _wnid(member: Member, path: Path) -> str:
    wnid = member.name.removesuffix(".tar")
    if not WNID.fullmatch(wnid):
        raise DataError(f"{path} holds {member.name!r} instead of one tar per class: it is not the official archive")
    return wnid


def _by_class(path: Path, wnids: list[str], classes: list[str]) -> list[list[Member]]:
    """The images of the validation archive by class: line i of the ground truth belongs to the i-th name, sorted."""
    with path.open("rb") as stream:
        members = sorted(_members(stream, path), key=lambda member: member.name)
    if len(members) != len(wnids):
        raise DataError(f"{path} holds {len(members)} images, but {DEVKIT} lists {len(wnids)}; get both again")
    per_class: dict[str, list[Member]] = {wnid: [] for wnid in classes}
    for member, wnid in zip(members, wnids, strict=True):
        per_class[wnid].append(member)
    return [per_class[wnid] for wnid in classes]


def read_devkit(path: Path) -> tuple[dict[int, str], list[int]]:
    """The devkit's ({class number: WordNet id} of the classes, class number of each validation image in file order).

    meta.mat lists all synsets of the hierarchy; those without children are the classes. Errors: DataError.
    """
    try:
        with open_tar_gz(path) as tar:
            meta, truth = (_content(tar, name) for name in (META, TRUTH))
        synsets = np.atleast_1d(scipy.io.loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"])
        leaves = synsets[synsets["num_children"] == 0]
        wnid_of = dict(zip(map(int, leaves["ILSVRC2012_ID"]), map(str, leaves["WNID"]), strict=True))
        numbers = [int(line) for line in truth.split()]
    except Exception as error:
        # The file combines three formats, whose readers raise many types for damaged content.
        raise DataError(f"{path} is damaged or not the official devkit: {type(error).__name__}: {error}") from None
    unknown = sorted(set(numbers) - set(wnid_of))
    if unknown:
        raise DataError(f"{path}: its ground truth names class {unknown[0]}, which its meta.mat lacks")
    return wnid_of, numbers


def _content(tar: tarfile.TarFile, name: str) -> bytes:
    stream = tar.extractfile(name)
    if stream is None:
        raise KeyError(name)
    return stream.read()
