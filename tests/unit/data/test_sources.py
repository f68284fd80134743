"""Listing sources: labels, order, and what is refused before an image is read."""

from __future__ import annotations

import gzip
import os
import struct
import sys
import types
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torchvision.datasets as tv

from pipeline.data.manifest import DataError
from pipeline.data.sources import decode, fashion_mnist
from pipeline.data.sources import source as source_module
from pipeline.data.sources.decode import Rendering
from pipeline.data.sources.fashion_mnist import read_idx
from pipeline.data.sources.image_folder import FolderOptions
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


def test_hidden_and_service_folders_and_other_files_are_passed_over_and_counted(tmp_path: Path) -> None:
    for split in ("train", "val"):
        folder = tmp_path / split
        touch(folder / "a" / "1.png", folder / "b" / "2.jpg", folder / "b" / "sub" / "3.gif")
        for service in (".ipynb_checkpoints", ".thumbnails", "@eaDir", "__MACOSX"):
            touch(folder / service / "x.jpg", folder / "a" / service / "deep" / "y.jpg")
        touch(folder / "a" / "._1.png", folder / "a" / ".DS_Store", folder / "a" / "list.TXT", folder / "a" / "README")
        touch(folder / "a" / "4.avif", folder / "loose.jpg")
    touch(tmp_path / "val" / ".hidden" / "z.jpg")  # which train/ lacks
    source = open_source("image_folder", "train", tmp_path)
    assert source.class_names == ("a", "b")
    assert source.names == ["a/1.png", "b/2.jpg", "b/sub/3.gif"]
    assert source.passed_over == {
        ".ipynb_checkpoints/": 2,
        ".thumbnails/": 2,
        "@eaDir/": 2,
        "__MACOSX/": 2,
        "hidden files": 2,
        ".txt": 1,
        ".avif": 1,
        "files without an extension": 1,
        "files beside the class folders": 1,
    }
    assert open_source("image_folder", "test", tmp_path).passed_over[".hidden/"] == 1


@pytest.mark.parametrize("installed", [True, False])
def test_heic_is_read_with_its_package_and_counted_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, installed: bool
) -> None:
    package: Any = types.ModuleType("pillow_heif")
    package.register_heif_opener = lambda: None
    monkeypatch.setitem(sys.modules, "pillow_heif", package if installed else None)
    decode.reads_heif.cache_clear()
    for split in ("train", "val"):
        touch(tmp_path / split / "a" / "1.png", tmp_path / split / "a" / "2.HEIC", tmp_path / split / "a" / "3.heif")
    source = open_source("image_folder", "train", tmp_path)
    decode.reads_heif.cache_clear()
    assert source.names == (["a/1.png", "a/2.HEIC", "a/3.heif"] if installed else ["a/1.png"])
    assert source.passed_over == ({} if installed else {".heic": 1, ".heif": 1})


def test_a_class_folder_whose_name_is_not_utf8_is_refused_by_name(tmp_path: Path) -> None:
    for split in ("train", "val"):
        touch(tmp_path / split / os.fsdecode(b"caf\xe9") / "1.png", tmp_path / split / "b" / "1.png")
    with pytest.raises(DataError, match=r"the name of class folder caf\\xe9 is not UTF-8; rename it"):
        open_source("image_folder", "train", tmp_path)


def flat_tree(folder: Path, counts: dict[str, int]) -> None:
    for name, count in counts.items():
        touch(*(folder / name / f"{i:03}.jpg" for i in range(count)))


def split_names(folder: Path, share: str) -> tuple[list[str], list[str]]:
    options = FolderOptions(val_fraction=Fraction(share))
    train, test = (open_source("image_folder", split, folder, folder=options) for split in ("train", "test"))
    assert train.class_names == test.class_names
    return train.names, test.names


@pytest.mark.parametrize("place", ["", "train"])
def test_a_share_of_every_class_is_held_out_always_the_same(tmp_path: Path, place: str) -> None:
    tree = tmp_path / "tree"
    flat_tree(tree / place, {"cat": 50, "dog": 10, "owl": 2})
    touch(tree / place / "cat" / os.fsdecode(b"\xe9.jpg"))
    train, test = split_names(tree, "0.2")
    assert sorted(train + test) == sorted({*train, *test})
    assert [sum(name.startswith(c) for name in test) for c in ("cat", "dog", "owl")] == [10, 2, 1]
    assert [sum(name.startswith(c) for name in train) for c in ("cat", "dog", "owl")] == [41, 8, 1]
    assert (train, test) == split_names(tree, "0.2")
    (tmp_path / "moved").mkdir()
    tree.rename(tmp_path / "moved" / "again")
    assert (train, test) == split_names(tmp_path / "moved" / "again", "1/5")
    touch(tmp_path / "moved" / "again" / place / "dog" / "new.jpg")
    _, after = split_names(tmp_path / "moved" / "again", "0.2")
    assert len(set(after) - set(test)) <= 1, "an added image moves no others"


@pytest.mark.parametrize("share", ["0", "1", "-1/2", "2"])
def test_shares_that_leave_nothing(share: str) -> None:
    with pytest.raises(DataError, match=f"--val-fraction {share} must lie between 0 and 1"):
        FolderOptions(val_fraction=Fraction(share))


def test_a_tree_that_cannot_be_split_as_asked(tmp_path: Path) -> None:
    half = FolderOptions(val_fraction=Fraction(1, 2))
    touch(tmp_path / "a" / "train" / "x" / "1.jpg", tmp_path / "a" / "val" / "x" / "2.jpg")
    with pytest.raises(DataError, match="has val/ already"):
        open_source("image_folder", "train", tmp_path / "a", folder=half)
    flat_tree(tmp_path / "b" / "train", {"x": 4, "y": 1})
    with pytest.raises(DataError, match=r"val is not a folder; --val-fraction 0\.2 holds out"):
        open_source("image_folder", "train", tmp_path / "b")
    with pytest.raises(DataError, match=r"train/y has one image, too few for a training and a test set"):
        open_source("image_folder", "train", tmp_path / "b", folder=half)


@pytest.mark.parametrize("dataset", ["fashion_mnist", "imagenet", "cifar10"])
def test_the_pixels_and_splits_of_published_data_sets_are_kept(tmp_path: Path, dataset: str) -> None:
    for options in (FolderOptions(Rendering((0, 0, 0))), FolderOptions(Rendering(exif_rotate=True))):
        with pytest.raises(DataError, match=f"are for image_folder; {dataset} keeps its authors' pixels"):
            open_source(dataset, "train", tmp_path, folder=options)


def test_idx_files_plain_and_gzipped(tmp_path: Path) -> None:
    images = write_idx_files(tmp_path / "idx")
    source = open_source("fashion_mnist", "train", tmp_path / "idx")
    assert source.labels.tolist() == [i % 10 for i in range(30)]
    pixels, kinds = source.read(7)
    assert kinds == ("grey",)
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


def test_a_gz_file_that_would_fill_the_memory_is_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_idx_files(tmp_path / "idx")
    images = tmp_path / "idx" / "t10k-images-idx3-ubyte.gz"
    monkeypatch.setattr(source_module, "MOST_UNCOMPRESSED_BYTES", 5 << 20)
    images.write_bytes(gzip.compress(bytes(5 << 20)))
    with pytest.raises(DataError, match="is not an idx file"):
        read_idx(tmp_path / "idx", "t10k-images-idx3-ubyte", 3)
    images.write_bytes(gzip.compress(bytes((5 << 20) + 1)))
    with pytest.raises(DataError, match=r"idx3-ubyte\.gz holds more than 5 MiB; is it the authors' file"):
        read_idx(tmp_path / "idx", "t10k-images-idx3-ubyte", 3)
    with pytest.raises(DataError, match="holds more than 5 MiB"):
        source_module.open_tar_gz(images)


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
