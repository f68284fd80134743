"""CIFAR and SVHN in their authors' formats: read as by torchvision, in the assert_equal_images order."""

from __future__ import annotations

import hashlib
import pickle
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torchvision.datasets as tv

from pipeline.data.manifest import DataError
from pipeline.data.sources import cifar, imagenet, svhn
from pipeline.data.sources.registry import open_source
from pipeline.data.sources.source import Source
from tests.support.synthetic_data import cifar_files, tar_of, write_svhn

PER_BATCH = 7
CIFARS = {"cifar10": tv.CIFAR10, "cifar100": tv.CIFAR100}


def md5(data: bytes) -> str:
    return hashlib.md5(data).hexdigest()


def unpack(dataset: str, files: dict[str, bytes], folder: Path) -> Path:
    place = folder / cifar.LAYOUTS[dataset].folder
    place.mkdir(parents=True)
    for name, data in files.items():
        (place / name).write_bytes(data)
    return place


def pack(dataset: str, files: dict[str, bytes], path: Path) -> Path:
    """Write an archive like the authors': the batches in their folder, and a page that is ignored."""
    layout = cifar.LAYOUTS[dataset]
    inside = {f"{layout.folder}/{name}": data for name, data in {"readme.html": b"<a href=x>", **files}.items()}
    path.write_bytes(tar_of(inside, "w:gz"))
    return path


def torchvisions_cifar(dataset: str, files: dict[str, bytes], root: Path, train: bool) -> tv.CIFAR10:
    """torchvision's own class on these files, with its MD5s replaced by theirs."""
    base = CIFARS[dataset]
    lists = {
        name: [[file, md5(files[file])] for file, _ in getattr(base, name)] for name in ("train_list", "test_list")
    }
    meta = {**base.meta, "md5": md5(files[str(base.meta["filename"])])}
    return type("Small", (base,), {**lists, "meta": meta})(str(root), train=train)


def assert_equal_images(source: Source, expected: tv.CIFAR10 | tv.SVHN, labels: object) -> None:
    assert len(source.names) == len(expected) > 0
    np.testing.assert_array_equal(source.labels, labels)
    for i in range(len(expected)):
        pixels, kinds = source.read(i)
        assert kinds == ()
        assert pixels.flags.c_contiguous
        np.testing.assert_array_equal(pixels, np.asarray(expected[i][0]))


@pytest.mark.parametrize("dataset", CIFARS)
@pytest.mark.parametrize("split", ["train", "test"])
def test_cifar_is_read_as_by_torchvision(tmp_path: Path, dataset: str, split: str) -> None:
    files = cifar_files(dataset, np.random.default_rng(0), PER_BATCH)
    unpacked = unpack(dataset, files, tmp_path / "root")
    archive = pack(dataset, files, tmp_path / cifar.LAYOUTS[dataset].archive)
    expected = torchvisions_cifar(dataset, files, tmp_path / "root", split == "train")
    sources = [open_source(dataset, split, place) for place in (tmp_path / "root", unpacked, tmp_path, archive)]
    for source in sources:
        assert_equal_images(source, expected, expected.targets)
        assert list(source.class_names) == expected.classes
    assert len({source.sha256 for source in sources}) == 1
    assert set(sources[0].authors_md5.values()) == {False}


def test_md5s_and_addresses_are_those_that_torchvision_publishes() -> None:
    for dataset, theirs in CIFARS.items():
        layout = cifar.LAYOUTS[dataset]
        assert (layout.url, layout.archive_md5) == (theirs.url, theirs.tgz_md5)
        listed = [*theirs.train_list, *theirs.test_list, [theirs.meta["filename"], theirs.meta["md5"]]]
        assert layout.md5 == dict(listed)
    for split, name in svhn.FILES.items():
        assert tv.SVHN.split_list[split] == [svhn.URL + name, name, svhn.MD5[name]]
    theirs = tv.imagenet.ARCHIVE_META
    assert [theirs[key][0] for key in ("train", "val")] == [imagenet.TRAIN, imagenet.VAL]
    assert theirs["devkit"] == (imagenet.DEVKIT, imagenet.DEVKIT_MD5)


def test_the_authors_files_are_recognised_by_their_md5(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = cifar_files("cifar100", np.random.default_rng(0), PER_BATCH)
    unpack("cifar100", files, tmp_path)
    for name in ("train", "meta"):
        monkeypatch.setitem(cifar.LAYOUTS["cifar100"].md5, name, md5(files[name]))
    assert open_source("cifar100", "train", tmp_path).authors_md5 == {"train": True, "meta": True}
    assert open_source("cifar100", "test", tmp_path).authors_md5 == {"test": False, "meta": True}


def test_a_truncated_archive_and_missing_batches_are_named(tmp_path: Path) -> None:
    files = cifar_files("cifar10", np.random.default_rng(0), PER_BATCH)
    archive = pack("cifar10", files, tmp_path / "cifar-10-python.tar.gz")
    whole = archive.read_bytes()
    for length in (0, 1, 20, 1000, len(whole) // 2, len(whole) - 30):
        archive.write_bytes(whole[:length])
        with pytest.raises(DataError, match=r"cifar-10-python\.tar\.gz cannot be read: .*get it again"):
            open_source("cifar10", "train", tmp_path)
    archive.write_bytes(whole.replace(whole[len(whole) // 2 :][:8], bytes(8)))
    with pytest.raises(DataError, match="get it again"):
        open_source("cifar10", "train", tmp_path)
    archive.unlink()
    with pytest.raises(DataError, match=r"holds neither cifar-10-python\.tar\.gz nor the folder cifar-10-batches-py"):
        open_source("cifar10", "train", tmp_path)
    del files["data_batch_4"]
    unpack("cifar10", files, tmp_path)
    with pytest.raises(DataError, match="lacks data_batch_4"):
        open_source("cifar10", "train", tmp_path)
    assert len(open_source("cifar10", "test", tmp_path).labels) == PER_BATCH


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"labels": [0, 1, 10]}, r"label 10 of image 2 is not one of the 10 classes"),
        ({"labels": [0, 1, -1]}, r"label -1 of image 2"),
        ({"labels": [0, 1]}, r"labels are int64 \[2\], expected integers \[3\]"),
        ({"labels": [0, 1, "2"]}, r"labels are <U"),
        ({"labels": [0, [1], 2]}, r"labels are not a list of numbers"),
        ({"data": np.zeros((3, 3071), np.uint8)}, r"images are uint8 \[3, 3071\], expected uint8 \[n, 3072\]"),
        ({"data": np.zeros((3, 3072))}, r"images are float64 \[3, 3072\]"),
        ({"data": [0]}, r"images are list"),
        ({"data": None}, r"images are NoneType"),
    ],
)
def test_invalid_batches_are_named(tmp_path: Path, change: dict[str, object], words: str) -> None:
    files = cifar_files("cifar10", np.random.default_rng(0), 3)
    batch = {"data": np.zeros((3, 3072), np.uint8), "labels": [0, 1, 2], **change}
    unpack("cifar10", {**files, "test_batch": pickle.dumps(batch)}, tmp_path)
    with pytest.raises(DataError, match=rf"test_batch: {words}"):
        open_source("cifar10", "test", tmp_path)
    (tmp_path / "cifar-10-batches-py" / "test_batch").write_bytes(pickle.dumps({"images": 3}))
    with pytest.raises(DataError, match=r"test_batch has no entry 'data', only images"):
        open_source("cifar10", "test", tmp_path)


@pytest.mark.parametrize("split", ["train", "test"])
def test_svhn_is_read_as_by_torchvision(tmp_path: Path, split: str) -> None:
    rng = np.random.default_rng(1)
    for name, count in (("train", 23), ("test", 12)):
        write_svhn(tmp_path / f"{name}_32x32.mat", rng, count)
    path = tmp_path / f"{split}_32x32.mat"
    lists = {split: ["", path.name, md5(path.read_bytes())]}
    expected = type("Small", (tv.SVHN,), {"split_list": lists})(str(tmp_path), split=split)
    source = open_source("svhn", split, tmp_path)
    assert_equal_images(source, expected, expected.labels)
    assert source.class_names == tuple("0123456789")
    assert source.labels.tolist()[:11] == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]
    assert source.authors_md5 == {path.name: False}


def test_damaged_svhn_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "test_32x32.mat"
    with pytest.raises(DataError, match=r"lacks test_32x32\.mat; get train_32x32\.mat and test_32x32\.mat"):
        open_source("svhn", "test", tmp_path)
    write_svhn(path, np.random.default_rng(1), 12)
    whole = path.read_bytes()
    for length in (0, 3, 100, 127, 130, 300, len(whole) // 2, len(whole) - 30):
        path.write_bytes(whole[:length])
        with pytest.raises(DataError, match=r"test_32x32\.mat (cannot be read|has no entry)"):
            open_source("svhn", "test", tmp_path)
    labels = np.ones((3, 1), np.uint8)
    for values, words in (
        ({"X": np.zeros((32, 32, 3, 3), np.uint8)}, "has no entry 'y', only "),
        ({"X": np.zeros((3, 32, 32, 3), np.uint8), "y": labels}, r"images are uint8 \[3, 3, 32, 32\]"),
        ({"X": np.zeros((32, 32, 3, 4), np.uint8), "y": labels}, r"expected integers \[4\]"),
        ({"X": np.zeros((32, 32, 3, 3), np.uint8), "y": labels + 10}, r"label 11 of image 0"),
    ):
        scipy.io.savemat(path, values)
        with pytest.raises(DataError, match=rf"test_32x32\.mat.*{words}"):
            open_source("svhn", "test", tmp_path)


@pytest.mark.parametrize(
    ("dataset", "split", "file"), [("cifar10", "train", "cifar-10-python.tar.gz"), ("svhn", "test", "test_32x32.mat")]
)
def test_torchvision_downloads_files_and_without_network_the_error_names_the_fix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dataset: str, split: str, file: str
) -> None:
    requests = []

    def fetch(url: str, root: str, filename: str, md5: str) -> None:
        requests.append((url, filename, md5))
        if len(requests) == 1:
            raise OSError("no network")
        folder = Path(root)
        folder.mkdir(parents=True)
        pack("cifar10", cifar_files("cifar10", np.random.default_rng(0), 3), folder / filename)
        if dataset == "svhn":
            write_svhn(folder / filename, np.random.default_rng(0), 15)

    fake = types.ModuleType("torchvision.datasets.utils")
    monkeypatch.setattr(fake, "download_url", fetch, raising=False)
    monkeypatch.setitem(sys.modules, "torchvision.datasets.utils", fake)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(DataError, match=rf"{file} could not be downloaded \(no network\); get it from .*--source"):
        open_source(dataset, split, None)
    assert len(open_source(dataset, split, None).labels) == 15
    assert [name for _, name, _ in requests] == [file, file]
    assert requests[0][0].endswith(file)
    assert len(requests[0][2]) == 32
