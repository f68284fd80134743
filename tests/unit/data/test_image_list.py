"""Listed images equal those of torchvision's own folder, decoder and transforms."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Subset
from torchvision.datasets import ImageFolder
from torchvision.transforms import CenterCrop, Compose, Resize, ToTensor

from pipeline.data.loading import image_list
from pipeline.data.loading.image_list import PREPROCESSING, ListedImages, list_sha256
from pipeline.data.loading.prefetch import LoaderError, map_in_threads
from pipeline.data.manifest import DataError

CLASSES = ("n01440764", "n01443537", "n02102040")
SIZES = [(300, 400), (500, 333), (256, 256), (90, 120), (231, 700)]
"""Height and width; some are smaller than the crop."""
ONE = np.array([0])
HANGS_S = 120
"""After so long a test considers a thread or process hung."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five images in three classes, all named .JPEG; one of them is grey, another is a PNG."""
    root, generator = tmp_path_factory.mktemp("val"), np.random.default_rng(0)
    for i, (height, width) in enumerate(SIZES):
        class_folder = root / CLASSES[i % 3]
        class_folder.mkdir(exist_ok=True)
        low = generator.integers(0, 256, (height // 8, width // 8, 3), np.uint8)
        image = Image.fromarray(low).resize((width, height))
        kind = "PNG" if i == 3 else "JPEG"
        (image.convert("L") if i == 1 else image).save(class_folder / f"val_{i}.JPEG", kind)
    return root


def names_of(folder: Path) -> list[str]:
    return sorted(f"{path.parent.name}/{path.name}" for path in folder.rglob("*.JPEG"))


def write_list(path: Path, names: list[str], end: str = "\n") -> Path:
    path.write_text(end.join(names), newline="")
    return path


def test_images_and_labels_are_torchvisions(folder: Path, tmp_path: Path) -> None:
    prepared = ImageFolder(str(folder), Compose([Resize(256), CenterCrop(224), ToTensor()]))
    order = [3, 0, 4, 1]  # not the folder's
    names = [str(Path(prepared.samples[i][0]).relative_to(folder)) for i in order]
    expected, labels = next(iter(DataLoader(Subset(prepared, order), batch_size=len(order))))
    with ListedImages(folder, write_list(tmp_path / "list.txt", names), CLASSES, threads=2) as images:
        assert images.num_samples == len(order)
        batches = list(images.batches([(np.array([0, 1, 2]), None), (np.array([3]), None)]))
    assert [batch.ids.tolist() for batch in batches] == [[0, 1, 2], [3]]
    assert torch.equal(torch.cat([batch.images for batch in batches]).float().div(255.0), expected)
    assert torch.equal(torch.cat([batch.labels for batch in batches]), labels)
    assert float(expected.std()) > 0.05


def test_identity_is_of_names_contents_and_preprocessing(folder: Path, tmp_path: Path) -> None:
    names = names_of(folder)

    def identity(root: Path, file: Path) -> dict[str, str]:
        with ListedImages(root, file, CLASSES, threads=1) as images:
            return images.identity

    usual = identity(folder, write_list(tmp_path / "a.txt", names))
    assert usual["preprocessing"] == PREPROCESSING == "torchvision, resize 256, centre crop 224"
    assert usual["image_list_sha256"] == hashlib.sha256("\n".join(names).encode()).hexdigest() == list_sha256(names)
    assert identity(folder, write_list(tmp_path / "b.txt", [*names, ""], "\r\n")) == usual
    other = identity(folder, write_list(tmp_path / "c.txt", names[::-1]))
    assert not set(other.values()) & {usual["data_sha256"], usual["image_list_sha256"]}
    copy = tmp_path / "copy"
    for name in names:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes((folder / name).read_bytes())
    assert identity(copy, tmp_path / "a.txt") == usual
    (copy / names[0]).write_bytes((folder / names[1]).read_bytes())
    changed = identity(copy, tmp_path / "a.txt")
    assert changed["data_sha256"] != usual["data_sha256"]
    assert changed["image_list_sha256"] == usual["image_list_sha256"]


def test_a_byte_order_mark_is_no_part_of_the_first_name(folder: Path, tmp_path: Path) -> None:
    names = names_of(folder)
    marked = write_list(tmp_path / "marked.txt", names)
    marked.write_bytes(b"\xef\xbb\xbf" + marked.read_bytes())
    assert ListedImages(folder, marked, CLASSES, threads=1).names == names


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda names: [*names, names[0]], "names images twice: n01440764/val_0.JPEG"),
        (lambda names: [*names, "n09999999/val_1.JPEG"], "names classes that the network was not trained on: n0999"),
        (lambda names: [*names, "n01440764/none.JPEG"], "lacks 1 of the 6 images that .*: n01440764/none.JPEG; give"),
        (lambda names: ["val_0.JPEG"], "expected <class>/<file> in every line, found val_0.JPEG"),
        (lambda names: ["../secret"], r"expected <class>/<file> in every line, found \.\./secret"),
        (lambda names: ["/etc/passwd"], "expected <class>/<file> in every line"),
        (lambda names: [], "expected <class>/<file> in every line, found none"),
    ],
)
def test_invalid_lists_are_refused(
    folder: Path, tmp_path: Path, change: Callable[[list[str]], list[str]], message: str
) -> None:
    file = write_list(tmp_path / "list.txt", change(names_of(folder)))
    with pytest.raises(DataError, match=message):
        ListedImages(folder, file, CLASSES, threads=1)


def test_a_broken_image_is_named_where_it_is_read(tmp_path: Path) -> None:
    (tmp_path / CLASSES[0]).mkdir()
    (tmp_path / CLASSES[0] / "a.JPEG").write_bytes(b"not an image")
    file = write_list(tmp_path / "list.txt", [f"{CLASSES[0]}/a.JPEG"])
    with ListedImages(tmp_path, file, CLASSES, threads=1) as images, pytest.raises(DataError, match=r"a\.JPEG cannot"):
        list(images.batches([(np.array([0]), None)]))
    with pytest.raises(DataError, match=r"nowhere\.txt cannot be read"):
        ListedImages(tmp_path, tmp_path / "nowhere.txt", CLASSES, threads=1)


def test_an_image_is_not_enlarged_beyond_all_memory(tmp_path: Path) -> None:
    (tmp_path / CLASSES[0]).mkdir()
    Image.new("RGB", (1, 60_000)).save(tmp_path / CLASSES[0] / "narrow.png")
    Image.new("RGB", (100, 1000)).save(tmp_path / CLASSES[0] / "long.png")
    file = write_list(tmp_path / "list.txt", [f"{CLASSES[0]}/long.png", f"{CLASSES[0]}/narrow.png"])
    with ListedImages(tmp_path, file, CLASSES, threads=1) as images:
        assert images.read(np.array([0])).images.shape == (1, 3, 224, 224)
        with pytest.raises(DataError, match=r"narrow\.png cannot be read: 60000 x 1 pixels are too narrow"):
            images.read(np.array([1]))


@pytest.mark.parametrize("use", [lambda images: images.identity, lambda images: list(images.batches([(ONE, None)]))])
def test_a_read_that_hangs_is_an_error_and_blocks_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, use: Callable[[ListedImages], object]
) -> None:
    (tmp_path / CLASSES[0]).mkdir()
    path = tmp_path / CLASSES[0] / "a.JPEG"
    shutil.copy(folder / names_of(folder)[0], path)
    file = write_list(tmp_path / "list.txt", [f"{CLASSES[0]}/a.JPEG"])
    messages: list[str] = []

    def read_images() -> None:
        with ListedImages(tmp_path, file, CLASSES, threads=1) as images:
            path.unlink()
            os.mkfifo(path)  # without a writer, opening it blocks
            monkeypatch.setattr(image_list, "FILE_DEADLINE_S", 0.05)
            monkeypatch.setattr(image_list, "sha256_of", Path.read_bytes)  # it would refuse a pipe
            with pytest.raises(LoaderError) as caught:
                use(images)
        messages.append(str(caught.value))

    thread = threading.Thread(target=read_images, daemon=True)
    thread.start()
    thread.join(HANGS_S)
    os.close(os.open(path, os.O_RDWR))  # unblocks the threads that wait for a writer
    assert messages == [f"{path}: no result within 0.05 s; its reader is stuck"]


def test_a_process_ends_although_its_reader_hangs(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "silent")
    code = (
        "import sys; from pathlib import Path; from pipeline.data.loading.prefetch import map_in_threads\n"
        "list(map_in_threads(Path.read_bytes, [Path(sys.argv[1])], threads=1, deadline_s=0.05))"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "silent")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANGS_S)
    assert done.returncode == 1
    assert "silent: no result within 0.05 s" in done.stderr


def test_a_functions_own_error_is_raised_unchanged_and_no_further_item_is_started() -> None:
    starts: list[int] = []
    proceed = threading.Event()

    def negate(i: int) -> int:
        starts.append(i)
        if i == 2:
            raise TimeoutError("of the file system")
        if i == 3:
            proceed.wait(HANGS_S)
        return -i

    results = map_in_threads(negate, range(10), threads=1, deadline_s=HANGS_S)
    assert [next(results), next(results)] == [0, -1]
    with pytest.raises(TimeoutError, match="of the file system"):
        next(results)
    proceed.set()
    for thread in [thread for thread in threading.enumerate() if thread.name == "map_in_threads"]:
        thread.join(HANGS_S)
    assert starts in ([0, 1, 2], [0, 1, 2, 3])


def test_files_that_are_inaccessible_or_unreadable_are_named(folder: Path, tmp_path: Path) -> None:
    name = f"{CLASSES[0]}/{'a' * 300}.JPEG"  # too long for any file system: an OSError, as for a forbidden folder
    with pytest.raises(DataError, match=r"a\.JPEG cannot be read: .*too long"):
        ListedImages(folder, write_list(tmp_path / "long.txt", [name]), CLASSES, threads=1)
    (tmp_path / CLASSES[0]).mkdir()
    path = tmp_path / CLASSES[0] / "a.JPEG"
    path.touch()
    file = write_list(tmp_path / "list.txt", [f"{CLASSES[0]}/a.JPEG"])
    with ListedImages(tmp_path, file, CLASSES, threads=1) as images:
        path.unlink()
        path.mkdir()
        with pytest.raises(DataError, match=r"a\.JPEG cannot be read: .*folder"):
            _ = images.identity
