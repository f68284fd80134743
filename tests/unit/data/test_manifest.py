"""FFCV files constructed byte by byte: which open, which are refused, what `verify` detects."""

from __future__ import annotations

import errno
import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline.data.manifest import (
    ALLOCATION,
    FIELD,
    FIELDS,
    HASH_PAGE_BYTES,
    HEADER,
    METADATA_START,
    MODE_JPEG,
    MODE_RAW,
    SAMPLE,
    DataError,
    Manifest,
    check_structure,
    index_sha256,
    manifest_path,
    open_checked,
    read_index,
)
from pipeline.data.writing.verify import check_samples, hash_file, verify_file

SAMPLES = 6
IN_PLACE = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


def check_progress(stage: str, done: int, total: int) -> None:
    assert 0 <= done <= total


def jpeg(rng: np.random.Generator, height: int, width: int) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(stream, "JPEG")
    return stream.getvalue()


def build_file(path: Path, seed: int = 0, height: int = 10, width: int = 12) -> Path:
    """Write a file of three raw and three JPEG samples, stored in reverse order, and its manifest."""
    rng = np.random.default_rng(seed)
    raw = [rng.integers(0, 256, 3 * height * width, dtype=np.uint8).tobytes() for _ in range(3)]
    stored = raw + [jpeg(rng, height, width) for _ in range(3)]
    samples = np.zeros(SAMPLES, SAMPLE)
    samples["mode"] = [MODE_RAW] * 3 + [MODE_JPEG] * 3
    samples["height"], samples["width"], samples["label"] = height, width, [0, 1, 0, 1, 0, 1]
    table = np.zeros(SAMPLES, ALLOCATION)
    position = METADATA_START + samples.nbytes
    data = b""
    for row, i in enumerate(reversed(range(SAMPLES))):
        samples["data_ptr"][i] = position + len(data)
        table[row] = (i, position + len(data), len(stored[i]))
        data += stored[i]
    header = np.zeros(1, HEADER)
    header[0] = (2, 2, HASH_PAGE_BYTES, SAMPLES, position + len(data))
    fields = np.zeros(2, FIELD)
    fields["type_id"], fields["name"] = [f[0] for f in FIELDS], [f[1] for f in FIELDS]
    path.write_bytes(header.tobytes() + fields.tobytes() + samples.tobytes() + data + table.tobytes())
    write_manifest(path)
    return path


def write_manifest(path: Path) -> None:
    structure = check_structure(path)
    check = check_samples(path, read_index(path, structure), check_progress)
    assert not check.faults
    sha256, pages = hash_file(path, check_progress)
    manifest = Manifest(
        dataset="image_folder",
        split="train",
        source="nowhere",
        source_sha256="0",
        num_samples=SAMPLES,
        num_classes=2,
        class_names=["cat", "dog"],
        label_histogram=[3, 3],
        image_mode="jpg",
        max_resolution=1600,
        jpeg_quality=90,
        skipped=[],
        converted={},
        file_size=structure.file_size,
        sha256=sha256,
        index_sha256=index_sha256(path, structure),
        content_sha256=check.content_sha256,
        pages=pages,
        sample_crc32=check.crc32_base64,
        versions={},
        written_at="2026-01-01T00:00:00+00:00",
    )
    manifest_path(path).write_text(manifest.model_dump_json())


def overwrite(path: Path, offset: int, data: bytes) -> None:
    with path.open("rb+") as stream:
        stream.seek(offset)
        stream.write(data)


def test_an_intact_file_opens_and_verifies(tmp_path: Path) -> None:
    path = build_file(tmp_path / "a.beton")
    assert check_structure(path).num_samples == SAMPLES
    assert open_checked(path).class_names == ["cat", "dog"]
    assert not verify_file(path, check_progress).damaged


def test_content_hash_depends_on_labels_and_not_on_order(tmp_path: Path) -> None:
    path = build_file(tmp_path / "a.beton")
    structure = check_structure(path)
    index = read_index(path, structure)
    content = check_samples(path, index, check_progress).content_sha256
    swapped = index.samples.copy(), index.sizes.copy()
    for array in swapped:
        array[[0, 4]] = array[[4, 0]]
    assert check_samples(path, type(index)(*swapped), check_progress).content_sha256 == content
    swapped[0]["label"][0] = 1
    assert check_samples(path, type(index)(*swapped), check_progress).content_sha256 != content


@pytest.mark.parametrize(
    ("offset", "data", "words"),
    [
        (0, b"\x03\x00", "not an FFCV file of version 2"),
        (2, b"\x03\x00", "image and label"),
        (HEADER.itemsize, b"\x04", "image and label"),
        (HEADER.itemsize + 1, b"photo", "image and label"),
        (16, bytes(8), "unfinished"),
        (8, b"\x07", "its header"),
        (8, bytes(8), "its header"),
        (16, b"\xff" * 8, "its header"),
    ],
)
def test_foreign_and_unfinished_files_are_refused(tmp_path: Path, offset: int, data: bytes, words: str) -> None:
    path = build_file(tmp_path / "a.beton")
    overwrite(path, offset, data)
    with pytest.raises(DataError, match=words) as caught:
        open_checked(path)
    assert str(path) in str(caught.value)
    assert "data write" in str(caught.value)


def test_pointer_that_wraps_around_is_refused(tmp_path: Path) -> None:
    path = build_file(tmp_path / "a.beton")
    table = check_structure(path).alloc_table_ptr
    overwrite(path, table + 8, np.array([2**64 - 100, 200], "<u8").tobytes())
    with pytest.raises(DataError, match="outside the image data"):
        check_structure(path)


def test_missing_file_and_missing_manifest(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        open_checked(tmp_path / "a.beton")
    path = build_file(tmp_path / "b.beton")
    manifest_path(path).unlink()
    with pytest.raises(DataError, match="no usable manifest"):
        open_checked(path)


@given(st.data())
@IN_PLACE
def test_a_truncated_file_is_refused(tmp_path: Path, data: st.DataObject) -> None:
    path = build_file(tmp_path / "a.beton")
    whole = path.read_bytes()
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    with pytest.raises(DataError):
        open_checked(path)


@given(st.data())
@IN_PLACE
def test_any_changed_byte_is_detected(tmp_path: Path, data: st.DataObject) -> None:
    """In the index by `open_checked`, in an image by `verify_file`, which names the sample."""
    path = build_file(tmp_path / "a.beton")
    structure, whole = check_structure(path), path.read_bytes()
    offset = data.draw(st.integers(0, len(whole) - 1))
    overwrite(path, offset, bytes([whole[offset] ^ data.draw(st.integers(1, 255))]))
    data_start = METADATA_START + SAMPLE.itemsize * SAMPLES
    if not data_start <= offset < structure.alloc_table_ptr:
        with pytest.raises(DataError):
            open_checked(path)
        return
    index = read_index(path, structure)
    begins = index.samples["data_ptr"].astype(int)
    [sample] = np.flatnonzero((begins <= offset) & (offset < begins + index.sizes.astype(int)))
    verification = verify_file(path, check_progress)
    assert list(verification.samples) == [sample]
    assert verification.pages == [0]


@given(st.data())
@IN_PLACE
def test_manifest_with_a_wrong_entry_is_refused_or_reported(tmp_path: Path, data: st.DataObject) -> None:
    path = build_file(tmp_path / "a.beton")
    values = json.loads(manifest_path(path).read_text())
    key = data.draw(
        st.sampled_from(
            ["num_samples", "num_classes", "file_size", "sha256", "index_sha256", "content_sha256", "pages"]
        )
    )
    wrong = {int: lambda v: v + 1, str: lambda v: v[:-1] + ("0" if v[-1] != "0" else "1"), list: lambda v: [*v, "x"]}
    values[key] = wrong[type(values[key])](values[key])
    manifest_path(path).write_text(json.dumps(values))
    if key in ("sha256", "content_sha256"):
        assert verify_file(path, check_progress).manifest == [key]
    else:
        with pytest.raises(DataError):
            open_checked(path)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"dataset": "x"}', "\x00"])
def test_damaged_manifest_is_refused(tmp_path: Path, text: str) -> None:
    path = build_file(tmp_path / "a.beton")
    manifest_path(path).write_text(text)
    with pytest.raises(DataError, match=r"a\.beton"):
        open_checked(path)


def test_the_manifest_of_another_file_is_refused(tmp_path: Path) -> None:
    """Numbers and file sizes are equal, JPEG sizes differ: only the index hash detects it."""
    path, other = build_file(tmp_path / "a.beton"), build_file(tmp_path / "b.beton", seed=1)
    manifest_path(path).write_bytes(manifest_path(other).read_bytes())
    with pytest.raises(DataError):
        open_checked(path)


def test_class_names_of_earlier_versions_that_are_not_utf8_can_be_shown(tmp_path: Path) -> None:
    path = build_file(tmp_path / "a.beton")
    values = json.loads(manifest_path(path).read_text()) | {"class_names": [os.fsdecode(b"caf\xe9"), "hÿ"]}
    manifest_path(path).write_text(json.dumps(values))
    names = open_checked(path).class_names
    assert names == ["caf\\xe9", "hÿ"]
    assert "".join(names).encode()


def restamp(path: Path) -> None:
    """Give the manifest the hash of the index as it is now, as somebody who made the file on purpose would."""
    values = json.loads(manifest_path(path).read_text())
    values["index_sha256"] = index_sha256(path, check_structure(path))
    manifest_path(path).write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("column", "value", "words"),
    [
        ("label", 7, "label 7 of image 2 is not one of the 2 classes"),
        ("label", -1, "label -1 of image 2 is not one of the 2 classes"),
        ("label", 1, "its labels are not those that its manifest counts"),
        ("height", 65535, "image 2 is 65535 x 12, its sides must be 1 to 1600"),
        ("width", 0, "image 2 is 10 x 0, "),
    ],
)
def test_an_index_whose_hash_fits_is_refused_for_what_it_says(
    tmp_path: Path, column: str, value: int, words: str
) -> None:
    path = build_file(tmp_path / "a.beton")
    field = SAMPLE.fields[column]  # type: ignore[index]
    overwrite(path, METADATA_START + 2 * SAMPLE.itemsize + field[1], np.array([value], field[0]).tobytes())
    restamp(path)
    with pytest.raises(DataError, match=words):
        open_checked(path)


def test_a_folder_and_a_pipe_are_called_what_they_are(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"is a folder; name a data file, such as {tmp_path}/train\.beton$"):
        open_checked(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="pipe is not a regular file"):
        open_checked(tmp_path / "pipe")


@pytest.mark.parametrize(
    "place", ["numpy.fromfile", "pathlib.Path.open", "pathlib.Path.stat", "pipeline.run.files.read_regular"]
)
def test_a_file_that_may_not_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    """Root may read every file, so the system's answer is played."""
    path = build_file(tmp_path / "a.beton")

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(place, refuse)
    with pytest.raises(DataError, match=r"a\.beton.* cannot be read: .*Permission denied"):
        open_checked(path)


def test_a_passing_fault_of_the_file_system_is_no_fault_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = build_file(tmp_path / "a.beton")

    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr("numpy.fromfile", fail)
    with pytest.raises(OSError, match="Stale file handle"):
        open_checked(path)
