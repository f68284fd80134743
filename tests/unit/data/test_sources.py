"""Listing sources: labels, order, and what is refused before an image is read."""

from __future__ import annotations

import gzip
import struct
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torchvision.datasets as tv

from pipeline.data.manifest import DataError
from pipeline.data.sources import fashion_mnist
from pipeline.data.sources.fashion_mnist import read_idx
from pipeline.data.sources.registry import open_source
from tests.support.synthetic_data import encoded, picture


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")


def idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write_idx_files(folder: Path, count: int = 30) -> np.ndarray:
    """Write four idx files, two of them gzipped; returns the training images."""
    folder.mkdir()
    images = np.random.default_rng(0).integers(0, 256, (count, 28, 28), dtype=np.uint8)
    labels = np.arange(count, dtype=np.uint8) % 10
    (folder / "train-images-idx3-ubyte").write_bytes(idx(images))
    (folder / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(labels)))
    (folder / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images[:10])))
    (folder / "t10k-labels-idx1-ubyte").write_bytes(idx(labels[:10]))
    return images


def test_classes_and_files_are_sorted_and_other_files_ignored(tmp_path: Path) -> None:
    for split in ("train", "val"):
        folder = tmp_path / split
        touch(
            folder / "b" / "2.JPEG", folder / "b" / "1.png", folder / "A" / "deep" / "x.Jpg", folder / "A" / "notes.txt"
        )
    source = open_source("image_folder", "test", tmp_path)
    assert source.class_names == ("A", "b")
    assert source.names == ["A/deep/x.Jpg", "b/1.png", "b/2.JPEG"]
    assert source.labels.tolist() == [0, 1, 1]


def test_listing_hash_depends_on_names_and_sizes(tmp_path: Path) -> None:
    touch(tmp_path / "train" / "a" / "1.png", tmp_path / "val" / "a" / "1.png")
    before = open_source("image_folder", "train", tmp_path).sha256
    assert open_source("image_folder", "train", tmp_path).sha256 == before
    touch(tmp_path / "train" / "a" / "2.png")
    added = open_source("image_folder", "train", tmp_path).sha256
    (tmp_path / "train" / "a" / "1.png").write_bytes(b"xx")
    assert len({before, added, open_source("image_folder", "train", tmp_path).sha256}) == 3


def test_other_classes_in_val_are_refused(tmp_path: Path) -> None:
    touch(tmp_path / "train" / "a" / "1.png", tmp_path / "train" / "b" / "1.png", tmp_path / "val" / "c" / "1.png")
    with pytest.raises(DataError, match=r"only in train/: a, b; only in val/: c"):
        open_source("image_folder", "train", tmp_path)


def test_empty_classes_are_named(tmp_path: Path) -> None:
    touch(tmp_path / "train" / "a" / "1.png", tmp_path / "train" / "b" / "readme.txt", tmp_path / "val" / "a" / "1.png")
    (tmp_path / "val" / "b").mkdir()
    with pytest.raises(DataError, match="no images in 1 of 2 classes: b"):
        open_source("image_folder", "train", tmp_path)


def test_missing_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="--source"):
        open_source("image_folder", "train", None)
    with pytest.raises(DataError, match="train is not a folder"):
        open_source("image_folder", "train", tmp_path)
    touch(tmp_path / "train" / "1.png")
    with pytest.raises(DataError, match="no class folders"):
        open_source("image_folder", "train", tmp_path)


def test_idx_files_plain_and_gzipped(tmp_path: Path) -> None:
    images = write_idx_files(tmp_path / "idx")
    source = open_source("fashion_mnist", "train", tmp_path / "idx")
    assert source.labels.tolist() == [i % 10 for i in range(30)]
    pixels, kind = source.read(7)
    assert kind == "grey"
    np.testing.assert_array_equal(pixels, np.stack([images[7]] * 3, axis=2))
    assert len(open_source("fashion_mnist", "test", tmp_path / "idx").labels) == 10


@pytest.mark.parametrize("split", ["train", "test"])
def test_fashion_mnist_is_read_as_by_torchvision(tmp_path: Path, split: str) -> None:
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.parent.mkdir()
    write_idx_files(raw)
    for gz_file in raw.glob("*.gz"):  # torchvision reads only uncompressed files
        gz_file.with_suffix("").write_bytes(gzip.decompress(gz_file.read_bytes()))
    expected = tv.FashionMNIST(str(tmp_path), train=split == "train")
    source = open_source("fashion_mnist", split, raw)
    assert list(source.class_names) == expected.classes
    assert source.labels.tolist() == expected.targets.tolist()
    assert len(source.names) == len(expected) > 0
    for i in range(len(expected)):
        pixels, _ = source.read(i)
        np.testing.assert_array_equal(pixels, np.stack([np.asarray(expected[i][0])] * 3, axis=2))


def test_an_image_folder_is_read_as_by_torchvision(tmp_path: Path) -> None:
    """Names that need sorting, a folder below a class, and a file that is not an image."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for n, name in enumerate(("b/10.png", "b/9.JPEG", "A/deep/x.Jpg", "A/1.jpeg")):
            file = tmp_path / split / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(encoded(picture(rng, n, 20, 24)))
        touch(tmp_path / split / "A" / "notes.txt")
    for split, place in (("train", "train"), ("test", "val")):
        source, expected = open_source("image_folder", split, tmp_path), tv.ImageFolder(str(tmp_path / place))
        assert list(source.class_names) == expected.classes
        assert source.labels.tolist() == expected.targets
        assert source.names == [str(Path(path).relative_to(tmp_path / place)) for path, _ in expected.samples]
        for i in range(len(expected)):
            np.testing.assert_array_equal(source.read(i)[0], np.asarray(expected[i][0]))


def test_missing_and_damaged_idx_files(tmp_path: Path) -> None:
    write_idx_files(tmp_path / "idx")
    labels = tmp_path / "idx" / "t10k-labels-idx1-ubyte"
    whole = labels.read_bytes()
    for damaged in (whole[:-1], whole[:5], b"", b"\x00\x00\x0d\x01" + whole[4:]):
        labels.write_bytes(damaged)
        with pytest.raises(DataError, match="t10k-labels"):
            open_source("fashion_mnist", "test", tmp_path / "idx")
    labels.unlink()
    with pytest.raises(DataError, match="lacks t10k-labels-idx1-ubyte"):
        open_source("fashion_mnist", "train", tmp_path / "idx")
    gz_file = tmp_path / "idx" / "t10k-images-idx3-ubyte.gz"
    gz_file.write_bytes(gz_file.read_bytes()[:-100])
    with pytest.raises(DataError, match="cannot be read"):
        read_idx(tmp_path / "idx", "t10k-images-idx3-ubyte", 3)


def test_failed_download_names_both_alternatives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(root: str, train: bool, download: bool) -> None:
        raise RuntimeError("no network")

    monkeypatch.setattr(fashion_mnist, "DEBIAN_FASHION_MNIST", tmp_path / "absent")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    fake = types.ModuleType("torchvision.datasets")
    monkeypatch.setattr(fake, "FashionMNIST", failing, raising=False)
    monkeypatch.setitem(sys.modules, "torchvision.datasets", fake)
    with pytest.raises(DataError, match=r"no network.*dataset-fashion-mnist.*--source"):
        open_source("fashion_mnist", "train", None)
