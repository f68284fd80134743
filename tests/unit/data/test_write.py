"""Writing real FFCV files: their content, and that no fault leaves a file that opens, or a process."""

from __future__ import annotations

import argparse
import errno
import io
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from PIL import Image

from launch.__main__ import main
from launch.commands.data import add_parser
from pipeline.data.manifest import (
    DataError,
    Structure,
    check_structure,
    manifest_path,
    open_checked,
    read_index,
)
from pipeline.data.sources.decode import reads_heif
from pipeline.data.sources.fashion_mnist import DEBIAN_FASHION_MNIST, read_idx
from pipeline.data.sources.registry import open_source
from pipeline.data.writing import write as write_module
from pipeline.data.writing.process import WriteError
from pipeline.data.writing.scan import Scan
from pipeline.data.writing.worker import check_free_space
from pipeline.data.writing.write import WriteOptions, commit_file, temporary_beside, write_dataset
from tests.support.commands import ROOT
from tests.support.synthetic_data import BROKEN, make_imagenet_tree
from tests.unit.data.test_manifest import build_file
from tests.unit.data.test_sources import idx


def check_progress(stage: str, done: int, total: int) -> None:
    assert 0 <= done <= total


def launch_data(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers())
    parsed = parser.parse_args(["data", *arguments])
    return parsed.handler(parsed)


def stored(path: Path) -> tuple[Structure, list[bytes], np.ndarray]:
    structure = check_structure(path)
    index, whole = read_index(path, structure), path.read_bytes()
    rows = zip(index.samples["data_ptr"].tolist(), index.sizes.tolist(), strict=True)
    return structure, [whole[ptr : ptr + size] for ptr, size in rows], index.samples


@pytest.fixture
def small_tree(tmp_path: Path) -> Path:
    make_imagenet_tree(tmp_path / "tree", num_classes=3, per_class=4, seed=0, val_per_class=1)
    return tmp_path / "tree"


def test_fashion_mnist_is_bit_exact_and_not_written_twice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A slice of the real images, through the command line."""
    folder, out = tmp_path / "idx", tmp_path / "out"
    folder.mkdir()
    slices = {}
    for name, dimensions in (("images-idx3-ubyte", 3), ("labels-idx1-ubyte", 1)):
        for prefix, count in (("train", 700), ("t10k", 50)):
            slices[prefix, dimensions] = read_idx(DEBIAN_FASHION_MNIST, f"{prefix}-{name}", dimensions)[:count]
            (folder / f"{prefix}-{name}").write_bytes(idx(slices[prefix, dimensions]))
    command = ["write", "fashion_mnist", "--source", str(folder), "--out", str(out)]
    assert launch_data(*command) == 0
    for split, prefix in (("train", "train"), ("test", "t10k")):
        structure, images, samples = stored(out / f"{split}.beton")
        assert structure.num_samples == len(slices[prefix, 3])
        assert samples["label"].tolist() == slices[prefix, 1].tolist()
        assert set(samples["mode"].tolist()) == {1}
        pixels = np.stack([np.frombuffer(image, np.uint8).reshape(28, 28, 3) for image in images])
        np.testing.assert_array_equal(pixels, np.stack([slices[prefix, 3]] * 3, axis=3))
    manifest = open_checked(out / "train.beton")
    assert manifest.converted == {"grey": 700}
    assert manifest.label_histogram == np.bincount(slices["train", 1], minlength=10).tolist()

    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    capsys.readouterr()
    assert launch_data(*command) == 0
    assert capsys.readouterr().out.count("already written") == 2
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before
    assert launch_data(*command, "--force", "--workers", "3") == 0
    rebuilt = open_checked(out / "train.beton")
    assert (rebuilt.content_sha256, rebuilt.sample_crc32) == (manifest.content_sha256, manifest.sample_crc32)
    assert launch_data(*command, "--quality", "80") == 2
    assert "--force" in capsys.readouterr().err
    assert launch_data("verify", str(out / "train.beton")) == 0
    assert launch_data("info", str(out / "train.beton")) == 0
    assert "Ankle boot" in capsys.readouterr().out

    with (out / "train.beton").open("rb+") as stream:
        stream.seek(int(stored(out / "train.beton")[2]["data_ptr"][123]) + 5)
        stream.write(bytes([images[0][5] ^ 255, 1, 2]))
    assert launch_data("verify", str(out / "train.beton")) == 1
    assert "sample 123 " in capsys.readouterr().out
    assert launch_data("verify", str(out / "none.beton")) == 2


def test_imagenet_shape_with_broken_images(tmp_path: Path) -> None:
    """1,000 class folders: one error names all broken files and nothing is written, or they are skipped."""
    offenders = make_imagenet_tree(
        tmp_path / "tree", 1000, per_class=1, seed=1, val_per_class=1, sizes=(65, 100), broken=tuple(BROKEN)
    )
    out = tmp_path / "out"
    with pytest.raises(DataError, match=f"^{len(BROKEN)} images cannot be") as caught:
        write_dataset("image_folder", tmp_path / "tree", out, WriteOptions(), False, check_progress)
    assert all(str(path) in str(caught.value) for path in offenders)
    assert list(out.iterdir()) == []

    options = WriteOptions(skip_broken=True, max_resolution=90)
    train, test = write_dataset("image_folder", tmp_path / "tree", out, options, False, check_progress)
    assert sorted(path.name for path in out.iterdir()) == sorted(
        name for split in ("train", "test") for name in (f"{split}.beton", f"{split}.beton.manifest.json")
    )
    assert [(w.manifest.num_samples, w.manifest.num_classes) for w in (train, test)] == [(1000, 1000), (1000, 1000)]
    assert [image.path for image in train.manifest.skipped] == [
        str(path.relative_to(tmp_path / "tree" / "train")) for path in offenders
    ]
    assert set(train.manifest.label_histogram) == {1}
    assert test.manifest.converted == {"cmyk": 100, "grey": 100}

    # Sample s is the s-th intact file of the sorted tree, up to the losses of JPEG and of shrinking by area.
    source = open_source("image_folder", "test", tmp_path / "tree")
    _, images, samples = stored(test.path)
    assert samples["label"].tolist() == list(range(1000))
    for s in (0, 1, 4, 8, 998):
        image = Image.open(io.BytesIO(images[s]))
        assert image.format == "JPEG"
        with Image.open(Path(source.location) / source.names[s]) as original:
            expected = original.convert("RGB").resize(image.size, Image.Resampling.BOX)
            assert max(image.size) == min(90, max(original.size))
        assert np.abs(np.asarray(image, float) - np.asarray(expected, float)).mean() < 4


WRITER = "pipeline.data.writing.worker"


WRITER = "pipeline.data.writing.worker"
"""The module that the writer and its workers run."""


def writer_processes() -> list[psutil.Process]:
    """The writer first, then its descendants; leftovers of other tests are not among them."""
    for child in psutil.Process().children():
        if WRITER in " ".join(child.cmdline()):
            return [child, *child.children(recursive=True)]
    return []


def shared_memory(processes: list[psutil.Process]) -> set[str]:
    """Paths of the shared memory that these processes hold open."""
    return {file.path for process in processes for file in process.open_files() if file.path.startswith("/dev/shm/")}


def is_worker(process: psutil.Process) -> bool:
    """Whether it is a living forked worker: not the writer itself, its resource tracker or a zombie."""
    try:
        command = " ".join(process.cmdline())
        return process.ppid() != os.getpid() and WRITER in command and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def sabotage(
    tree: Path, spoil: Callable[[Path], None], act: Callable[[list[psutil.Process]], bool] | None
) -> tuple[Callable[[str, int, int], None], list[psutil.Process], set[str]]:
    """A progress callback that spoils train's first image after the scan, and then calls `act` until that returns True.

    Also returns the collections that it fills: all processes and all shared memory of the writer that it has seen.
    """
    victim = sorted((tree / "train").glob("*/*"))[0]
    processes: list[psutil.Process] = []
    memory: set[str] = set()
    state = {"image done": False, "act done": False}

    def progress(stage: str, done: int, total: int) -> None:
        if stage == "test list" and not state["image done"]:
            victim.unlink()
            spoil(victim)
            state["image done"] = True
        if stage == "train write" and act is not None and not state["act done"]:
            running = writer_processes()
            processes.extend(process for process in running if process not in processes)
            memory.update(shared_memory(running[:1]))
            state["act done"] = act(running)

    return progress, processes, memory


def kill_worker(running: list[psutil.Process]) -> bool:
    """At every report: the first worker may be one that succeeds, as only one of them gets the FIFO."""
    for process in filter(is_worker, running):
        process.kill()
    return False


def kill_writer(running: list[psutil.Process]) -> bool:
    if not any(map(is_worker, running)):
        return False
    running[0].kill()
    return True


@pytest.mark.parametrize(
    ("spoil", "act", "words"),
    [
        (os.mkfifo, kill_worker, "a worker of the writer was killed by SIGKILL"),
        (os.mkfifo, kill_writer, "the writer was killed by SIGKILL in stage 'train write'"),
        (lambda path: path.write_bytes(b"?"), None, "a worker of the writer failed: .*BrokenImage: not an image"),
    ],
    ids=["killed worker", "killed writer", "failing worker"],
)
def test_a_fault_ends_in_one_error_and_leaves_nothing(
    small_tree: Path,
    tmp_path: Path,
    spoil: Callable[[Path], None],
    act: Callable[[list[psutil.Process]], bool] | None,
    words: str,
) -> None:
    """A FIFO in place of an image blocks an FFCV worker as long as the test needs."""
    progress, processes, memory = sabotage(small_tree, spoil, act)
    with pytest.raises(WriteError, match=words):
        write_dataset(
            "image_folder", small_tree, tmp_path / "out", WriteOptions(2, stall_seconds=60.0), False, progress
        )
    assert list((tmp_path / "out").iterdir()) == []
    if act is not None:
        assert len(processes) >= 3, "the writer, its resource tracker and a worker were seen"
        assert memory
    assert not any(Path(path).exists() for path in memory)
    _, alive = psutil.wait_procs(processes, timeout=10)
    assert alive == []


def test_a_stuck_and_stopped_writer_is_terminated(small_tree: Path, tmp_path: Path) -> None:
    """A FIFO in place of an image keeps it in the scan, which reports progress; stages that do not have an hour."""
    victim = sorted((small_tree / "train").glob("*/*"))[0]
    victim.unlink()
    os.mkfifo(victim)
    processes: list[psutil.Process] = []

    def stop(stage: str, done: int, total: int) -> None:
        if stage == "train scan":
            processes.extend(writer_processes())
            os.kill(processes[0].pid, signal.SIGSTOP)

    options = WriteOptions(stall_seconds=3.0)
    with pytest.raises(WriteError, match="no progress for 3 seconds while in stage 'train scan'"):
        write_dataset("image_folder", small_tree, tmp_path / "out", options, False, stop)
    assert list((tmp_path / "out").iterdir()) == []
    assert processes
    _, alive = psutil.wait_procs(processes, timeout=10)
    assert alive == []


FULL_DISK = """
import resource, sys
from tests.unit.data.test_write import launch_data
resource.setrlimit(resource.RLIMIT_FSIZE, (3_000_000, 3_000_000))
sys.exit(launch_data("write", "image_folder", "--source", sys.argv[1], "--out", sys.argv[2], "--workers", "2"))
"""


def test_full_disk(small_tree: Path, tmp_path: Path) -> None:
    """A file may not grow beyond 3 MB; the first page ends at 4 MiB."""
    out = tmp_path / "out"
    command = [sys.executable, "-c", FULL_DISK, str(small_tree), str(out)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 1, result.stderr
    assert "File too large" in result.stderr
    assert "Traceback" not in result.stderr
    assert list(out.iterdir()) == []


def test_few_images_make_a_small_file(small_tree: Path, tmp_path: Path) -> None:
    """FFCV's page is 8 MiB, and every worker fills one."""
    train, test = write_dataset("image_folder", small_tree, tmp_path / "out", WriteOptions(8), False, check_progress)
    assert [check_structure(file.path).page_size for file in (train, test)] == [2 << 20, 2 << 20]
    assert max(file.manifest.file_size for file in (train, test)) < 5_000_000


@pytest.mark.parametrize(
    ("count", "side", "quality", "page"),
    [
        (10, 32, 90, 2 << 20),
        (20_000, 32, 90, 2 << 20),
        (50_000, 32, 90, 8 << 20),
        (100, 500, 100, 2 << 20),
        (100, 800, 90, 8 << 20),
        (1000, 500, 90, 8 << 20),
    ],
)
def test_pages_hold_any_image_and_are_large_for_large_files(count: int, side: int, quality: int, page: int) -> None:
    scan = Scan(np.arange(count), np.full((count, 2), side), {}, [], [])
    assert scan.page_size(quality) == page


def test_writer_ends_when_its_parent_is_killed(small_tree: Path, tmp_path: Path) -> None:
    victim = sorted((small_tree / "train").glob("*/*"))[0]
    victim.unlink()
    os.mkfifo(victim)
    out = tmp_path / "out"
    code = "import sys; from tests.unit.data.test_write import launch_data; launch_data(*sys.argv[1:])"
    command = [sys.executable, "-c", code, "write", "image_folder", "--source", str(small_tree), "--out", str(out)]
    parent = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    assert parent.stderr is not None
    try:
        # The FIFO blocks the scan, so the writer is alive when it is orphaned.
        assert any("train scan" in line for line in parent.stderr)
        orphans = psutil.Process(parent.pid).children(recursive=True)
        assert orphans
    finally:
        parent.kill()
        parent.wait(10)
        parent.stderr.close()
    _, alive = psutil.wait_procs(orphans, timeout=20)
    assert alive == []
    assert list(out.iterdir()) == []


def test_too_little_space_is_reported_before_writing(tmp_path: Path) -> None:
    check_free_space(tmp_path, 1)
    with pytest.raises(WriteError, match="GB free"):
        check_free_space(tmp_path, 1 << 60)


@pytest.mark.parametrize("crash", range(5))
def test_a_crash_while_renaming_leaves_all_or_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, crash: int
) -> None:
    """A file that opens under the final name is the complete new or the complete old one, with its own manifest."""
    path, temporary = build_file(tmp_path / "a.beton", seed=1), build_file(tmp_path / "a.beton.1.tmp", seed=2)
    old, new = path.read_bytes(), temporary.read_bytes()
    calls = 0

    def count_calls(operation: Callable[..., None]) -> Callable[..., None]:
        def call(*arguments: object, **options: object) -> None:
            nonlocal calls
            if calls == crash:
                raise KeyboardInterrupt
            calls += 1
            operation(*arguments, **options)

        return call

    monkeypatch.setattr(Path, "unlink", count_calls(Path.unlink))
    monkeypatch.setattr(write_module.os, "replace", count_calls(os.replace))
    if crash < 4:
        with pytest.raises(KeyboardInterrupt):
            commit_file(temporary, path)
    else:
        commit_file(temporary, path)
        assert calls == 4
    if path.exists():
        open_checked(path)
        assert path.read_bytes() == (old if crash == 0 else new)
    assert path.exists() == (crash in (0, 4))


def test_temporary_files_of_dead_processes_are_removed_and_of_living_ones_refuse(tmp_path: Path) -> None:
    path = tmp_path / "a.beton"
    dead = build_file(tmp_path / "a.beton.1.tmp")
    notes = tmp_path / "a.beton.notes.tmp"
    notes.touch()
    with temporary_beside(path) as temporary:
        assert notes.exists(), "it is not named by a process, so it is not ours"
        with pytest.raises(DataError, match="being written by another process"), temporary_beside(path):
            pass  # as in another container, where a process has the same pid
        assert temporary.exists()
        assert not dead.exists()
        assert not manifest_path(dead).exists()
        other = temporary.rename(tmp_path / "a.beton.2.tmp")
        with pytest.raises(DataError, match="being written by another process"), temporary_beside(path):
            pass
        assert other.exists()
        other.unlink()
    assert list(tmp_path.iterdir()) == [notes]


def test_a_file_without_manifest_is_not_replaced(small_tree: Path, tmp_path: Path) -> None:
    precious = tmp_path / "out" / "train.beton"
    precious.parent.mkdir()
    precious.write_bytes(b"somebody else's")
    with pytest.raises(DataError, match=r"no manifest.*--force"):
        write_dataset("image_folder", small_tree, tmp_path / "out", WriteOptions(), False, check_progress)
    assert precious.read_bytes() == b"somebody else's"


def test_options_out_of_range() -> None:
    for make in (
        lambda: WriteOptions(workers=0),
        lambda: WriteOptions(max_resolution=1601),
        lambda: WriteOptions(jpeg_quality=101),
    ):
        with pytest.raises(DataError, match="must"):
            make()


def own_photographs(folder: Path) -> None:
    """Two classes without val/: transparent, turned, animated and other files."""
    rng = np.random.default_rng(0)
    for name in ("café", "tea"):
        (folder / name / ".thumbnails").mkdir(parents=True)
        (folder / name / "film.heic").write_bytes(b"?")
        for i in range(4):
            Image.fromarray(rng.integers(0, 256, (20, 30, 3), np.uint8)).save(folder / name / f"{i}.png")
        exif = Image.Exif()
        exif[0x0112] = 6
        clear = Image.new("RGBA", (20, 30), (1, 2, 3, 0))
        clear.save(folder / name / "clear.png", exif=exif)
        frames = [Image.new("RGB", (20, 30), colour) for colour in ("red", "blue")]
        frames[0].save(folder / name / "moving.gif", save_all=True, append_images=frames[1:])


def test_own_photographs_are_split_and_what_was_done_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    reads_heif.cache_clear()
    own_photographs(tmp_path / "mine")
    command = ["write", "image_folder", "--source", str(tmp_path / "mine"), "--out", str(tmp_path / "out")]
    options = ["--background", "#0a141e", "--exif-rotate", "--val-fraction", "1/3", "--workers", "1"]
    assert launch_data(*command, *options) == 0
    out = capsys.readouterr().out
    assert out.count("passed over 2 .heic, 2 .thumbnails/; pip install pillow-heif reads HEIC") == 2
    manifests = [open_checked(tmp_path / "out" / f"{split}.beton") for split in ("train", "test")]
    assert [manifest.label_histogram for manifest in manifests] == [[4, 4], [2, 2]]
    done = manifests[0].converted.keys() | manifests[1].converted.keys()
    assert done == {"alpha", "palette", "EXIF rotation applied", "first of several frames"}
    for manifest in manifests:
        assert (manifest.background, manifest.exif_rotate, manifest.val_fraction) == ("#0a141e", True, "1/3")
    images = [image for split in ("train", "test") for image in stored(tmp_path / "out" / f"{split}.beton")[1]]
    assert sum(image == bytes((10, 20, 30)) * 600 for image in images) == 2
    assert "transparent pixels are #0a141e" in out
    assert launch_data(*command, *options) == 0
    assert capsys.readouterr().out.count("already written") == 2
    for other in (["--background", "none", *options[2:]], options[2:], [*options[:2], *options[3:]]):
        assert launch_data(*command, *other) == 2
        assert "with other background" in (err := capsys.readouterr().err) or "with other exif_rotate" in err
    reads_heif.cache_clear()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--background", "whitish"], "--background whitish: unknown color specifier"),
        (["--background", "#11223344"], "--background #11223344: .* is itself transparent"),
        (["--val-fraction", "many"], "--val-fraction many: expected a number"),
        (["--val-fraction", "1.5"], "--val-fraction 3/2 must lie between 0 and 1"),
    ],
)
def test_options_that_are_none(
    tmp_path: Path, options: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert launch_data("write", "image_folder", "--source", str(tmp_path), "--out", str(tmp_path / "o"), *options) == 2
    assert re.search(words, capsys.readouterr().err)


def test_a_folder_that_may_not_be_written_is_named(
    small_tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["write", "image_folder", "--source", str(small_tree), "--out", str(tmp_path / "out")]
    (tmp_path / "out").write_text("a file")
    assert launch_data(*command) == 2
    assert "out cannot be made: File exists" in capsys.readouterr().err
    (tmp_path / "out").unlink()
    original = Path.open

    def refuse(self: Path, mode: str = "r", *rest: Any, **more: Any) -> Any:
        if mode == "xb":  # root may write everywhere
            raise PermissionError(errno.EACCES, "Permission denied")
        return original(self, mode, *rest, **more)

    monkeypatch.setattr(Path, "open", refuse)
    assert launch_data(*command) == 2
    assert "out cannot be written: Permission denied" in capsys.readouterr().err


def test_names_in_a_strangers_manifest_do_not_control_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = build_file(tmp_path / "a.beton")
    values = json.loads(manifest_path(path).read_text()) | {"class_names": ["a\x1b[2Jb", "c\nd"], "source": "/\u202ea"}
    manifest_path(path).write_text(json.dumps(values))
    assert main(["data", "info", str(path)]) == 0
    out = capsys.readouterr().out
    assert "3 a\\x1b[2Jb" in out
    assert "3 c\\nd" in out
    assert "from /\\u202ea" in out
    assert not set("\x1b\u202e") & set(out)


def test_a_terminal_that_is_not_utf8_shows_all(tmp_path: Path) -> None:
    path = build_file(tmp_path / "a.beton")
    values = json.loads(manifest_path(path).read_text()) | {"class_names": ["café", "猫"], "source": "/a\udcff"}
    manifest_path(path).write_text(json.dumps(values))
    for encoding in ("ascii", "utf-8", "latin-1"):
        done = subprocess.run(
            [sys.executable, "-m", "launch", "data", "info", str(path)],
            cwd=tmp_path,
            env={**os.environ, "PYTHONIOENCODING": encoding, "LC_ALL": "C"},
            capture_output=True,
            timeout=240,
        )
        assert done.returncode == 0, done.stderr
        lines = done.stdout.decode(encoding).splitlines()
        assert lines[-2].split()[1] == "café".encode(encoding, "backslashreplace").decode(encoding)
        assert lines[-1].split()[1] == "猫".encode(encoding, "backslashreplace").decode(encoding)
