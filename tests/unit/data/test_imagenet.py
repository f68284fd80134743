"""ImageNet from its archives: images, labels and order equal torchvision's after it has unpacked them."""

from __future__ import annotations

import errno
import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torchvision.datasets import ImageFolder, imagenet

from pipeline.data.manifest import DataError
from pipeline.data.sources.imagenet import DEVKIT, TRAIN, VAL
from pipeline.data.sources.registry import open_source
from tests.support.synthetic_data import devkit, encoded, picture, tar_of

WNIDS = ("n02119789", "n01440764", "n15075141")
"""Class numbers 1, 2, 3 of the devkit: not in alphabetical order, as the official ones are not."""
VALIDATION = (WNIDS[1], WNIDS[0], WNIDS[2], WNIDS[0])


def write_archives(folder: Path) -> None:
    """Write archives of three classes of three images, and of four validation images, not in the order of names."""
    rng = np.random.default_rng(0)

    def jpeg(label: int, mode: str = "RGB") -> bytes:
        return encoded(picture(rng, label, 20, 24).convert(mode))

    inner = {}
    for label, wnid in enumerate(WNIDS):
        images = {f"{wnid}_{n}.JPEG": jpeg(label, "L" if n == 2 else "RGB") for n in (10, 2, 7)}
        inner[f"{wnid}.tar"] = tar_of(images)
    validation = {f"ILSVRC2012_val_{n:08}.JPEG": jpeg(n) for n in (3, 1, 4, 2)}
    (folder / TRAIN).write_bytes(tar_of(inner))
    (folder / VAL).write_bytes(tar_of(validation))
    (folder / DEVKIT).write_bytes(devkit(WNIDS, VALIDATION))


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("archives")
    write_archives(folder)
    return folder


@pytest.fixture
def unpacked(archives: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder to which torchvision unpacks them; its MD5s are replaced by theirs."""
    for key, (name, _) in list(imagenet.ARCHIVE_META.items()):
        data = (archives / name).read_bytes()
        monkeypatch.setitem(imagenet.ARCHIVE_META, key, (name, hashlib.md5(data).hexdigest()))
        (tmp_path / name).write_bytes(data)
    imagenet.parse_devkit_archive(tmp_path)
    imagenet.parse_train_archive(tmp_path)
    imagenet.parse_val_archive(tmp_path)
    for name in (TRAIN, VAL, DEVKIT):
        (tmp_path / name).unlink()
    return tmp_path


@pytest.mark.filterwarnings("ignore:Python 3.14 will:DeprecationWarning")
@pytest.mark.parametrize(("split", "place"), [("train", "train"), ("test", "val")])
def test_the_archives_hold_what_torchvision_unpacks(archives: Path, unpacked: Path, split: str, place: str) -> None:
    before = sorted(archives.iterdir())
    source = open_source("imagenet", split, archives)
    expected = ImageFolder(str(unpacked / place))
    assert list(source.class_names) == expected.classes == sorted(WNIDS)
    assert source.labels.tolist() == expected.targets
    assert source.names == [os.path.relpath(path, unpacked / place) for path, _ in expected.samples]
    for i in range(len(expected)):
        pixels, _ = source.read(i)
        np.testing.assert_array_equal(pixels, np.asarray(expected[i][0]))
    assert sorted(archives.iterdir()) == before, "nothing is unpacked"

    tree = open_source("imagenet", split, unpacked)
    assert (tree.names, tree.sha256, tree.dataset) == (source.names, source.sha256, "imagenet")
    assert source.authors_md5 == {DEVKIT: False}


def test_threads_can_read_at_once(archives: Path) -> None:
    source = open_source("imagenet", "train", archives)
    alone = [source.read(i)[0] for i in range(len(source.names))]
    assert len({pixels.tobytes() for pixels in alone}) == 9
    wanted = np.random.default_rng(0).integers(0, 9, 500).tolist()
    with ThreadPoolExecutor(8) as pool:
        for i, (pixels, _) in zip(wanted, pool.map(source.read, wanted), strict=True):
            np.testing.assert_array_equal(pixels, alone[i])


def test_a_disk_that_fails_is_named(archives: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: object) -> bytes:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "pread", failing)
    with pytest.raises(DataError, match=rf"{archives} cannot be read: Input/output error"):
        open_source("imagenet", "train", archives)


def test_missing_archives_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"--source the folder that holds {TRAIN}, {VAL}, {DEVKIT}"):
        open_source("imagenet", "train", None)
    (tmp_path / VAL).touch()
    with pytest.raises(DataError, match=rf"lacks {TRAIN}, {DEVKIT}"):
        open_source("imagenet", "train", tmp_path)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
@pytest.mark.parametrize(("split", "name"), [("train", TRAIN), ("test", VAL), ("test", DEVKIT)])
def test_a_truncated_archive_is_named(archives: Path, tmp_path: Path, split: str, name: str, data: st.DataObject):
    """Truncated anywhere in a tar.gz, and in a tar before the zeros at its end, of which one block suffices."""
    for other in (TRAIN, VAL, DEVKIT):
        (tmp_path / other).write_bytes((archives / other).read_bytes())
    whole = (archives / name).read_bytes()
    end = len(whole.rstrip(b"\0")) if name != DEVKIT else len(whole) - 1
    (tmp_path / name).write_bytes(whole[: data.draw(st.integers(0, end))])
    with pytest.raises(DataError, match=name):
        open_source("imagenet", split, tmp_path)


def test_a_truncated_class_archive_does_not_run_into_the_next(archives: Path, tmp_path: Path) -> None:
    """Python's tarfile would read on, and take the next header of the outer archive for one of the inner archive."""
    write_archives(tmp_path)
    images = {f"{WNIDS[0]}_{n}.JPEG": bytes(100) for n in range(3)}
    without_end = tar_of(images).rstrip(b"\0")[: 512 * 5]
    inner = {f"{wnid}.tar": without_end + bytes(-len(without_end) % 512) for wnid in WNIDS}
    (tmp_path / TRAIN).write_bytes(tar_of(inner))
    with pytest.raises(DataError, match=rf"{TRAIN}, {WNIDS[1]}\.tar is truncated"):
        open_source("imagenet", "train", tmp_path)


def test_a_damaged_header_is_not_the_end(archives: Path, tmp_path: Path) -> None:
    write_archives(tmp_path)
    whole = bytearray((tmp_path / VAL).read_bytes())
    place = whole.index(b"ILSVRC2012_val_00000004.JPEG")
    whole[place + 130] ^= 1
    (tmp_path / VAL).write_bytes(whole)
    with pytest.raises(DataError, match=rf"{VAL} is damaged at byte {place}"):
        open_source("imagenet", "test", tmp_path)


def test_archives_of_something_else_are_refused(archives: Path, tmp_path: Path) -> None:
    write_archives(tmp_path)
    image = encoded(picture(np.random.default_rng(0), 0, 20, 20))
    good = {f"{wnid}.tar": tar_of({f"{wnid}_1.JPEG": image}) for wnid in WNIDS}
    for files, words in (
        ({**good, "../../etc/passwd": b"x"}, "holds '../../etc/passwd', which is not a regular file"),
        ({**good, "readme.txt": b"x"}, "holds 'readme.txt' instead of one tar per class"),
        ({name: good[name] for name in list(good)[:2]}, f"only in {DEVKIT}: n15075141"),
        ({**good, "../n02119789.tar": b"x"}, "which is not a regular file"),
        ({**good, "n00000001.tar": good["n02119789.tar"]}, f"only in {TRAIN}: n00000001"),
        ({**good, "n02119789.tar": tar_of({})}, "no images in 1 of 3 classes: n02119789"),
        ({**good, "n02119789.tar": tar_of({"x" * 120: image})}, "which is not a regular file"),
    ):
        (tmp_path / TRAIN).write_bytes(tar_of(files))
        with pytest.raises(DataError, match=words):
            open_source("imagenet", "train", tmp_path)
    (tmp_path / TRAIN).write_bytes(tar_of(good))
    assert len(open_source("imagenet", "train", tmp_path).labels) == 3
    (tmp_path / VAL).write_bytes(tar_of({f"ILSVRC2012_val_{n:08}.JPEG": image for n in range(5)}))
    with pytest.raises(DataError, match=rf"{VAL} holds 5 images, but {DEVKIT} lists 4"):
        open_source("imagenet", "test", tmp_path)
