"""The structure of an FFCV file, and the manifest that describes its content.

Every reader opens such a file through `open_checked`, which takes a fraction of a second and refuses files that are
unfinished, truncated, foreign or altered in their index. Damage inside the stored images is detected by
`pipeline.data.writing.verify`, which reads the whole file. numpy only: no torch, no ffcv.

An FFCV file of version 2 is a header of 24 bytes, one descriptor of 1,041 bytes per field, one row of metadata per
sample, pages of image bytes, and the allocation table, 24 bytes per stored image, which is written last. Here the two
fields are always `image` (RGBImageField) and `label` (IntField), so there is one allocation per sample.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from pipeline.run.disk import TRANSIENT
from pipeline.run.files import read_json

FORMAT_VERSION = 2
HASH_PAGE_BYTES = 8 << 20
MANIFEST_SUFFIX = ".manifest.json"

HEADER = np.dtype(
    {
        "names": ["version", "num_fields", "page_size", "num_samples", "alloc_table_ptr"],
        "formats": ["<u2", "<u2", "<u4", "<u8", "<u8"],
    }
)
FIELD = np.dtype([("type_id", "u1"), ("name", "S16"), ("arguments", "V1024")])
SAMPLE = np.dtype(
    {
        "names": ["mode", "width", "height", "data_ptr", "label"],
        "formats": ["u1", "<u2", "<u2", "<u8", "<i8"],
        "offsets": [0, 1, 3, 5, 16],
        "itemsize": 24,
    }
)
ALLOCATION = np.dtype([("sample_id", "<u8"), ("ptr", "<u8"), ("size", "<u8")])
FIELDS = [(2, b"image"), (1, b"label")]
METADATA_START = HEADER.itemsize + len(FIELDS) * FIELD.itemsize
MODE_JPEG, MODE_RAW = 0, 1
LARGEST_RESOLUTION = 1600
"""Longest side of a stored image: it must fit into one 8 MiB page of the file, even uncompressed."""

REWRITE = "write it again with `python -m launch data write ... --force`"


class DataError(ValueError):
    """A data set or an FFCV file cannot be used; the message names the file and the fix."""


@dataclass(frozen=True)
class Structure:
    """The header of a complete FFCV file, in bytes and samples."""

    num_samples: int
    page_size: int
    alloc_table_ptr: int
    file_size: int


@dataclass(frozen=True)
class SampleIndex:
    """Where every sample is stored: arrays of shape [num_samples], by sample id."""

    samples: NDArray[np.void]
    """dtype SAMPLE: mode (0 JPEG, 1 raw), width, height, data_ptr, label."""
    sizes: NDArray[np.uint64]
    """Bytes stored at data_ptr."""


class Skipped(BaseModel):
    """A source image that was left out."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    path: str
    reason: str


def _encodable(names: list[str]) -> list[str]:
    """Names of folders as text: bytes that are not UTF-8, which earlier versions wrote as surrogates, become \\xe9."""
    return [name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace") for name in names]


class Manifest(BaseModel):
    """An FFCV file's content and source, and hashes that detect any change."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    dataset: str
    split: str
    source: str
    source_sha256: str
    """Over the names and sizes of the source files, or their content: shows whether a file is up to date."""
    authors_md5: dict[str, bool] = {}
    """Source file -> whether its MD5 is the one its authors published; omits files without a published MD5."""
    num_samples: int
    num_extra: int = Field(default=0, ge=0)
    """How many of the samples, the last ones, are extra training images with pseudo-labels."""
    extra_source: str | None = None
    num_classes: int
    class_names: Annotated[list[str], AfterValidator(_encodable)]
    """By label."""
    chosen_from: list[str] | None = None
    """All classes of the data set, by their original labels, if `class_names` is a subset of them."""
    label_histogram: list[int]
    image_mode: str
    """'raw' (bit-exact pixels) or 'jpg'."""
    max_resolution: int
    jpeg_quality: int
    skipped: list[Skipped]
    converted: dict[str, int]
    """Number of source images that were not plain RGB, by kind, for example {'grey': 7, 'cmyk': 2}."""
    passed_over: dict[str, int] = {}
    """Number of files and folders of a tree that were not read, by extension or name."""
    background: str | None = None
    """#rrggbb behind transparent pixels; None: each has the colour that was stored for it."""
    exif_rotate: bool = False
    val_fraction: str | None = None
    """Share of every class's images in the test set, if the source was not split."""
    file_size: int
    sha256: str
    """Of the whole file; differs between rebuilds, as workers write pages in any order."""
    index_sha256: str
    """Of header, sample metadata and allocation table; `open_checked` recomputes it."""
    content_sha256: str
    """Over the sorted hashes of all samples (label, size, stored bytes): equal between rebuilds."""
    pages: list[str]
    """BLAKE2b-128 of every 8 MiB of the file, in order; the last page may be short."""
    sample_crc32: str
    """Base64 of num_samples little-endian uint32: CRC-32 of every sample's stored bytes."""
    versions: dict[str, str]
    written_at: str

    @model_validator(mode="after")
    def _lengths_agree(self) -> Manifest:
        expected = {
            "class_names": self.num_classes,
            "label_histogram": self.num_classes,
            "pages": -(-self.file_size // HASH_PAGE_BYTES),
        }
        for name, length in expected.items():
            if len(getattr(self, name)) != length:
                raise ValueError(f"{name} has {len(getattr(self, name))} entries, not {length}")
        if self.num_extra >= self.num_samples:
            raise ValueError(f"num_extra {self.num_extra} must be less than num_samples {self.num_samples}")
        if len(self.crc32_of_samples()) != self.num_samples or sum(self.label_histogram) != self.num_samples:
            raise ValueError(f"sample_crc32 or label_histogram does not cover {self.num_samples} samples")
        return self

    def crc32_of_samples(self) -> NDArray[np.uint32]:
        """Shape [num_samples], by sample id."""
        return np.frombuffer(base64.b64decode(self.sample_crc32), dtype="<u4")


def manifest_path(path: str | Path) -> Path:
    """The path of an FFCV file's manifest, which lies beside it."""
    path = Path(path)
    return path.with_name(path.name + MANIFEST_SUFFIX)


@contextmanager
def _naming_faults(path: Path) -> Iterator[None]:
    """DataError for a file that may not be read; errors that may pass stay an OSError."""
    try:
        yield
    except OSError as error:
        if error.errno in TRANSIENT:
            raise
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from None


def _read_array(path: Path, dtype: np.dtype, count: int, offset: int) -> NDArray[np.void]:
    with _naming_faults(path):
        array = np.fromfile(path, dtype=dtype, count=count, offset=offset)
    if len(array) != count:
        raise DataError(f"{path} is truncated: expected {count} rows at byte {offset}, got {len(array)}; {REWRITE}")
    return array


def check_structure(path: str | Path) -> Structure:
    """Refuse a file that is not a complete FFCV file of images and labels; reads header and allocation table only.

    Errors: DataError naming the file and the fix. Altered bytes inside pages or metadata are not detected.
    """
    path = Path(path)
    file_size = _file_size(path)
    if file_size < METADATA_START:
        raise DataError(f"{path} has {file_size} bytes, too few for an FFCV file; {REWRITE}")
    header = _read_array(path, HEADER, 1, 0)[0]
    if header["version"] != FORMAT_VERSION:
        raise DataError(f"{path} is not an FFCV file of version {FORMAT_VERSION}; {REWRITE}")
    fields = _read_array(path, FIELD, len(FIELDS), HEADER.itemsize)
    descriptors = [(int(field["type_id"]), bytes(field["name"])) for field in fields]
    if header["num_fields"] != len(FIELDS) or descriptors != FIELDS:
        raise DataError(f"{path} must hold the fields image and label and nothing else; {REWRITE}")
    num_samples, alloc_table_ptr = int(header["num_samples"]), int(header["alloc_table_ptr"])
    if alloc_table_ptr == 0:
        raise DataError(f"{path} is unfinished: its writer stopped before the end; {REWRITE}")
    expected = alloc_table_ptr + ALLOCATION.itemsize * num_samples
    if num_samples == 0 or file_size != expected:
        raise DataError(
            f"{path} has {file_size} bytes, but its header ({num_samples} samples) requires {expected}; {REWRITE}"
        )
    data_start = METADATA_START + SAMPLE.itemsize * num_samples
    table = _read_array(path, ALLOCATION, num_samples, alloc_table_ptr)
    # Compared without adding, as a damaged uint64 could wrap around.
    inside = (table["ptr"] >= data_start) & (table["ptr"] <= alloc_table_ptr)
    if not inside.all() or not (table["size"] <= alloc_table_ptr - table["ptr"]).all():
        raise DataError(f"{path} is damaged: its allocation table points outside the image data; {REWRITE}")
    return Structure(num_samples, int(header["page_size"]), alloc_table_ptr, file_size)


def _file_size(path: Path) -> int:
    with _naming_faults(path):
        if not path.exists():
            raise DataError(f"{path} does not exist; create it with `python -m launch data write`")
        if path.is_dir():
            raise DataError(f"{path} is a folder; name a data file, such as {path / 'train.beton'}")
        if not path.is_file():
            raise DataError(f"{path} is not a regular file")
        return path.stat().st_size


def index_sha256(path: str | Path, structure: Structure) -> str:
    """Hash of header, field descriptors, metadata and allocation table (72 MB for ImageNet)."""
    digest = hashlib.sha256()
    with _naming_faults(Path(path)), Path(path).open("rb") as stream:
        digest.update(stream.read(METADATA_START + SAMPLE.itemsize * structure.num_samples))
        stream.seek(structure.alloc_table_ptr)
        digest.update(stream.read(ALLOCATION.itemsize * structure.num_samples))
    return digest.hexdigest()


def read_index(path: str | Path, structure: Structure) -> SampleIndex:
    """Labels, sizes and offsets of all samples. Errors: DataError if metadata and allocation table disagree."""
    path = Path(path)
    samples = _read_array(path, SAMPLE, structure.num_samples, METADATA_START)
    table = _read_array(path, ALLOCATION, structure.num_samples, structure.alloc_table_ptr)
    table = table[np.argsort(table["sample_id"], kind="stable")]
    if not np.array_equal(table["sample_id"], np.arange(len(table))) or not np.array_equal(
        table["ptr"], samples["data_ptr"]
    ):
        raise DataError(f"{path} is damaged: metadata and allocation table disagree; {REWRITE}")
    return SampleIndex(samples, table["size"])


def read_manifest(path: str | Path) -> Manifest:
    """The manifest of FFCV file `path`. Errors: DataError if it is missing or damaged."""
    try:
        return Manifest.model_validate(read_json(manifest_path(path)))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise DataError(f"{manifest_path(path)} is damaged ({first['loc']}: {first['msg']}); {REWRITE}") from None
    except ValueError as error:
        raise DataError(f"{path} has no usable manifest ({error}); {REWRITE}") from None


def open_checked(path: str | Path) -> Manifest:
    """The manifest of a file that is complete and matches it; cheap enough for every start.

    Errors: DataError for a file that is missing, unreadable, unfinished, truncated, foreign, or whose index was altered
    or does not fit the manifest.
    """
    structure = check_structure(path)
    manifest = read_manifest(path)
    for name in ("num_samples", "file_size"):
        expected, actual = getattr(manifest, name), getattr(structure, name)
        if expected != actual:
            raise DataError(f"{path} has {name} {actual}, but its manifest says {expected}; {REWRITE}")
    if index_sha256(path, structure) != manifest.index_sha256:
        raise DataError(f"{path} is damaged: labels or allocation table differ from its manifest; {REWRITE}")
    _check_samples_fit(Path(path), read_index(path, structure).samples, manifest)
    return manifest


def _check_samples_fit(path: Path, samples: NDArray[np.void], manifest: Manifest) -> None:
    """Refuse labels that are no class and sizes that no writer stores: a hash that fits does not make them right."""
    labels = samples["label"]
    outside = np.flatnonzero((labels < 0) | (labels >= manifest.num_classes))
    if len(outside):
        first, of = outside[0], f"the {manifest.num_classes} classes"
        raise DataError(f"{path}: label {labels[first]} of image {first} is not one of {of}; {REWRITE}")
    if np.bincount(labels, minlength=manifest.num_classes).tolist() != manifest.label_histogram:
        raise DataError(f"{path}: its labels are not those that its manifest counts; {REWRITE}")
    sides = np.stack([samples["height"], samples["width"]])
    largest = min(manifest.max_resolution, LARGEST_RESOLUTION)
    wrong = np.flatnonzero((sides < 1).any(axis=0) | (sides > largest).any(axis=0))
    if len(wrong):
        height, width = sides[:, wrong[0]]
        raise DataError(f"{path}: image {wrong[0]} is {height} x {width}, its sides must be 1 to {largest}; {REWRITE}")
