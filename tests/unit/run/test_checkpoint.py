"""Checkpoints: committed atomically, any damage detected, a bounded number kept, errors of the writer's thread raised;
full disks and transient file system errors."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.run import checkpoint
from pipeline.run.checkpoint import CheckpointDamaged, Snapshot, Writer
from pipeline.run.disk import PAUSES_S, DiskFull
from pipeline.run.files import read_json
from pipeline.run.layout import progress_marks
from pipeline.run.lease import LeaseHeld
from pipeline.run.progress import Progress, Window
from tests.support.failing_calls import Faults, build_library

ROOT = Path(__file__).parents[3]
FILES = [*checkpoint.CONTENT, "MANIFEST.json"]
DEADLINE_S = 30


def snapshot(step: int, best_step: int | None = None) -> Snapshot:
    generator = torch.Generator().manual_seed(step)
    model = {
        "weight/conv1.weight": torch.randn(4, 3, generator=generator),
        "buffer/bn1.num_batches_tracked": torch.tensor(step),
    }
    optimizer = {"optim/weight/conv1.weight/momentum_buffer": torch.randn(4, 3, generator=generator)}
    window = Window(loss_sum=0.1 * step, robust_correct=step, images=64, steps=3)
    return Snapshot(model, optimizer, Progress(step, 10, 100, window, best_step, 0.25))


def same(a: Snapshot, b: Snapshot) -> bool:
    def equal(x: checkpoint.Tensors, y: checkpoint.Tensors) -> bool:
        return x.keys() == y.keys() and all(torch.equal(x[k], y[k]) and x[k].dtype == y[k].dtype for k in x)

    return equal(a.model, b.model) and equal(a.train_state, b.train_state) and a.progress == b.progress


def newest(stage: Path) -> int | None:
    snapshot = checkpoint.read_newest_checkpoint(stage)
    return None if snapshot is None else snapshot.progress.step


def allow(step: int) -> None:
    """A guard that never refuses."""


def committed(stage: Path) -> int:
    """The newest step, as watchers see it."""
    return progress_marks(stage.parent, [stage.name])[0]


def test_a_checkpoint_is_read_back_exactly(tmp_path: Path) -> None:
    folder = checkpoint.write_checkpoint(tmp_path, snapshot(7))
    assert same(checkpoint.read_checkpoint(folder), snapshot(7))
    assert not same(checkpoint.read_checkpoint(folder), snapshot(8))
    assert sorted(os.listdir(folder)) == sorted(FILES)
    assert (tmp_path / "LATEST").read_text() == "step-0000000007\n"
    checkpoint.write_checkpoint(tmp_path, snapshot(12))
    assert (tmp_path / "LATEST").read_text() == "step-0000000012\n"
    assert newest(tmp_path) == committed(tmp_path) == 12


def test_an_empty_stage_has_no_checkpoint(tmp_path: Path) -> None:
    for stage in (tmp_path, tmp_path / "absent"):
        assert newest(stage) is None
        assert committed(stage) == 0


def test_without_manifest_it_does_not_exist(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    checkpoint.write_checkpoint(tmp_path, snapshot(5))
    (checkpoint.write_checkpoint(tmp_path, snapshot(10)) / "MANIFEST.json").unlink()
    assert committed(tmp_path) == 5
    assert newest(tmp_path) == 5
    assert "step-0000000010 was being written" in caplog.text
    checkpoint.write_checkpoint(tmp_path, snapshot(10))  # by the resumed run
    assert newest(tmp_path) == 10


def test_a_writer_replaced_while_frozen_does_not_touch_its_successors_checkpoint(tmp_path: Path) -> None:
    checkpoint.write_checkpoint(tmp_path, snapshot(5))
    other = Snapshot({}, {}, Progress(5, 10, 100))
    with pytest.raises(FileExistsError, match="step-0000000005 already exists: another process writes"):
        checkpoint.write_checkpoint(tmp_path, other)
    assert newest(tmp_path) == 5


def test_the_manifest_is_the_last_file(tmp_path: Path) -> None:
    seen: list[set[str]] = []
    folder = checkpoint.folder_of(tmp_path, 5)
    checkpoint.write_checkpoint(tmp_path, snapshot(5), lambda: seen.append({path.name for path in folder.iterdir()}))
    assert seen == [set(checkpoint.CONTENT)]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stage with checkpoints of steps 5 and 10."""
    stage = tmp_path_factory.mktemp("stage")
    for step in (5, 10):
        checkpoint.write_checkpoint(stage, snapshot(step))
    return stage


def assert_skipped(pair: Path, name: str, changed: bytes) -> None:
    """With these bytes in a file, the newer checkpoint counts as damaged and the older one is read; restores it."""
    path = checkpoint.folder_of(pair, 10) / name
    whole = path.read_bytes()
    try:
        path.write_bytes(changed)
        with pytest.raises(CheckpointDamaged, match="step-0000000010"):
            checkpoint.check_checkpoint(path.parent)
        assert newest(pair) == 5
    finally:
        path.write_bytes(whole)
    checkpoint.check_checkpoint(path.parent)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(
    name=st.sampled_from(FILES), where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), truncate=st.booleans()
)
def test_every_flipped_bit_and_every_truncation_is_detected(
    pair: Path, name: str, where: float, bit: int, truncate: bool
) -> None:
    whole = (checkpoint.folder_of(pair, 10) / name).read_bytes()
    place = int(where * len(whole))
    changed = whole[:place] if truncate else whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :]
    if truncate and name == "MANIFEST.json" and changed.rstrip() == whole.rstrip():
        return  # only the final newline is missing
    assert_skipped(pair, name, changed)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_detected_and_named(pair: Path, tmp_path: Path, name: str) -> None:
    stage = tmp_path / "stage"
    shutil.copytree(pair, stage)
    (checkpoint.folder_of(stage, 10) / name).unlink()
    with pytest.raises(CheckpointDamaged, match=name):
        checkpoint.read_checkpoint(checkpoint.folder_of(stage, 10))
    assert newest(stage) == 5


def test_damaged_checkpoints_are_logged_and_skipped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folders = [checkpoint.write_checkpoint(tmp_path, snapshot(step)) for step in (5, 10, 15)]
    (folders[2] / "model.safetensors").write_bytes(b"")
    os.replace(folders[0] / "train_state.safetensors", folders[1] / "train_state.safetensors")  # another's
    with caplog.at_level(logging.ERROR):
        assert newest(tmp_path) is None
    assert [record.levelname for record in caplog.records] == ["ERROR"] * 3
    for step in (5, 10, 15):
        assert f"step-{step:010d}" in caplog.text


def test_a_folder_under_another_step_is_not_that_checkpoint(tmp_path: Path) -> None:
    checkpoint.write_checkpoint(tmp_path, snapshot(5)).rename(checkpoint.folder_of(tmp_path, 9))
    assert newest(tmp_path) is None


@pytest.mark.parametrize(
    ("keep", "protected", "left"),
    [
        (2, (None, None), [4, 5]),
        (2, (1, None), [1, 4, 5]),
        (1, (5, None), [4, 5]),
        (1, (2, 2), [2, 5]),
        (1, (3, 1), [1, 3, 5]),
        (9, (), [1, 2, 3, 4, 5]),
    ],
)
def test_the_newest_the_best_and_the_rollback_checkpoint_are_kept(
    tmp_path: Path, keep: int, protected: tuple[int | None, ...], left: list[int]
) -> None:
    for step in range(1, 6):
        checkpoint.write_checkpoint(tmp_path, snapshot(step))
    checkpoint.delete_old_checkpoints(tmp_path, keep, *protected)
    assert checkpoint.steps_on_disk(tmp_path) == left
    for step in left:
        checkpoint.check_checkpoint(checkpoint.folder_of(tmp_path, step))


def test_checkpoints_after_the_resumed_step_are_deleted(tmp_path: Path) -> None:
    for step in (5, 10, 15):
        checkpoint.write_checkpoint(tmp_path, snapshot(step))
    checkpoint.delete_checkpoints_after(tmp_path, 10)
    assert checkpoint.steps_on_disk(tmp_path) == [5, 10]
    checkpoint.delete_checkpoints_after(tmp_path, 0)
    assert checkpoint.steps_on_disk(tmp_path) == []
    checkpoint.delete_checkpoints_after(tmp_path / "absent", 0)


def test_other_folders_are_left_alone(tmp_path: Path) -> None:
    for name in ("evaluate", "step-1", "step-0000000001x", "wandb"):
        (tmp_path / name).mkdir()
    checkpoint.delete_checkpoints_after(tmp_path, 0)
    checkpoint.delete_old_checkpoints(tmp_path, 1, None)
    assert len(os.listdir(tmp_path)) == 4


def test_the_writer_deletes_old_checkpoints_and_wait_waits_for_it(tmp_path: Path) -> None:
    writer = Writer(tmp_path, 2, allow)
    for step in (1, 2, 3, 4):
        writer.submit(snapshot(step, best_step=1))
    writer.wait()
    writer.wait()
    assert checkpoint.steps_on_disk(tmp_path) == [1, 3, 4]
    assert newest(tmp_path) == 4


def test_submit_does_not_wait_for_the_disk_and_never_writes_two_at_once(tmp_path: Path) -> None:
    started, go = threading.Event(), threading.Event()
    active, overlapping = [], []

    def guard(step: int) -> None:
        active.append(step)
        overlapping.append(len(active))
        started.set()
        assert go.wait(DEADLINE_S)
        active.remove(step)

    writer = Writer(tmp_path, 2, guard)
    writer.submit(snapshot(1))  # returns while the guard blocks the manifest
    assert started.wait(DEADLINE_S)
    assert committed(tmp_path) == 0
    go.set()
    writer.submit(snapshot(2))
    writer.wait()
    assert overlapping == [1, 1]
    assert newest(tmp_path) == 2


@pytest.mark.parametrize("next_call", ["wait", "submit"])
def test_an_error_of_the_writer_is_raised_at_its_next_call(tmp_path: Path, next_call: str) -> None:
    stage = tmp_path / "stage"
    stage.write_text("a file where the folder should be")
    writer = Writer(stage, 2, allow)
    writer.submit(snapshot(1))
    with pytest.raises(OSError, match=str(stage)):
        writer.wait() if next_call == "wait" else writer.submit(snapshot(2))
    writer.wait()  # an error is raised once


def test_a_refusing_guard_leaves_no_checkpoint(tmp_path: Path) -> None:
    checkpoint.write_checkpoint(tmp_path, snapshot(1))

    def refuse(step: int) -> None:
        raise LeaseHeld(f"not yours at {step}")

    writer = Writer(tmp_path, 1, refuse)
    writer.submit(snapshot(2))
    with pytest.raises(LeaseHeld, match="not yours at 2"):
        writer.wait()
    assert newest(tmp_path) == committed(tmp_path) == 1
    assert (tmp_path / "LATEST").read_text() == "step-0000000001\n"


def test_the_manifest_has_sizes_and_hashes(tmp_path: Path) -> None:
    folder = checkpoint.write_checkpoint(tmp_path, snapshot(3))
    manifest = read_json(folder / "MANIFEST.json")
    assert (manifest["step"], sorted(manifest["files"])) == (3, sorted(checkpoint.CONTENT))
    for name, entry in manifest["files"].items():
        assert entry["bytes"] == (folder / name).stat().st_size


# --- every kind of damage --------------------------------------------------------------------------------------------


def truncate_half(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def grow(path: Path) -> None:
    with path.open("ab") as stream:
        stream.write(b"x")


def zero_a_block(path: Path) -> None:
    """As a file system does that lost a write."""
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] + bytes(len(whole) - len(whole) // 2))


def flip_a_bit(path: Path) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole[:-9] + bytes([whole[-9] ^ 4]) + whole[-8:])


def copy_another(path: Path) -> None:
    """The same file of step 1, which is written first and never damaged."""
    shutil.copy(checkpoint.folder_of(path.parent.parent, 1) / path.name, path)


DAMAGES = [truncate_half, empty, grow, zero_a_block, flip_a_bit, copy_another, Path.unlink]


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(
    damaged=st.dictionaries(
        st.sampled_from([5, 10, 15]),
        st.dictionaries(st.sampled_from(FILES), st.sampled_from(DAMAGES), min_size=1),
    ),
    latest=st.sampled_from(["step-0000000099\n", "step-0000000005\n", "", "\0garbage", None]),
)
def test_the_newest_intact_checkpoint_is_read_whatever_the_damage_to_others(
    tmp_path_factory: pytest.TempPathFactory, damaged: dict[int, dict[str, Callable[[Path], None]]], latest: str | None
) -> None:
    stage = tmp_path_factory.mktemp("stage")
    for step in (1, 5, 10, 15):
        checkpoint.write_checkpoint(stage, snapshot(step))
    for step, files in damaged.items():
        for name, damage in files.items():
            damage(checkpoint.folder_of(stage, step) / name)
    if latest is None:
        (stage / "LATEST").unlink()
    else:
        (stage / "LATEST").write_text(latest)
    expected = max({1, 5, 10, 15} - damaged.keys())
    result = checkpoint.read_newest_checkpoint(stage)
    assert result is not None
    assert same(result, snapshot(expected))
    for step in damaged:
        with pytest.raises(CheckpointDamaged, match=f"step-{step:010d}"):
            checkpoint.read_checkpoint(checkpoint.folder_of(stage, step))
    shutil.rmtree(checkpoint.folder_of(stage, 1))
    assert newest(stage) == max({5, 10, 15} - damaged.keys(), default=None)
    shutil.rmtree(stage)


@pytest.mark.parametrize(
    "manifest", ["", "[]", "null", "7", '"x"', "{}", '{"files": 3}', '{"files": [1]}', '{"files": {}}']
)
def test_a_manifest_with_other_content_is_damage(pair: Path, manifest: str) -> None:
    assert_skipped(pair, "MANIFEST.json", manifest.encode())


def test_the_manifest_hashes_the_bytes_in_memory_and_not_those_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint.write_checkpoint(tmp_path, snapshot(5))
    real = os.fsync

    def losing(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        if path.name == "model.safetensors":
            zero_a_block(path)
        real(descriptor)

    monkeypatch.setattr(os, "fsync", losing)
    folder = checkpoint.write_checkpoint(tmp_path, snapshot(10))
    with pytest.raises(CheckpointDamaged, match=r"step-0000000010 does not match .* model\.safetensors"):
        checkpoint.check_checkpoint(folder)
    assert newest(tmp_path) == 5


# --- full disks and transient errors ------------------------------------------------------------


def set_free_space(monkeypatch: pytest.MonkeyPatch, free: int, total: int = 10**12) -> None:
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(total=total, free=free))


def test_a_checkpoint_takes_no_more_space_than_needed_bytes(tmp_path: Path) -> None:
    tensors = {
        f"optim/score/layer4.2.some.long.name.conv{n}.weight/momentum_buffer": torch.zeros(3) for n in range(2000)
    }
    for large in (snapshot(1), Snapshot(tensors, tensors, Progress(1, 10, 100))):
        folder = checkpoint.write_checkpoint(tmp_path, large, again=True)
        disk_usage = sum(-(-path.stat().st_size // 4096) * 4096 for path in folder.iterdir())
        assert disk_usage <= checkpoint.needed_bytes(large)


def test_without_space_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    stage = tmp_path / "run" / "stage"
    needed = checkpoint.needed_bytes(snapshot(10))
    set_free_space(monkeypatch, needed)
    checkpoint.write_checkpoint(stage, snapshot(5))
    set_free_space(monkeypatch, needed - 1)
    before = sorted(tmp_path.rglob("*"))
    pauses: list[float] = []
    writer = Writer(stage, 2, allow, pauses.append)
    writer.submit(snapshot(10))
    with pytest.raises(DiskFull) as caught:
        writer.wait()
    assert caught.value.errno == errno.ENOSPC
    for words in (f"needs {needed} bytes", "make room, then resume", str(stage)):
        assert words in str(caught.value)
    assert f"and {needed - 1} are free" in caplog.text
    assert pauses == []
    assert sorted(tmp_path.rglob("*")) == before
    assert newest(stage) == 5
    set_free_space(monkeypatch, needed - 2)
    with pytest.raises(DiskFull) as again:
        checkpoint.write_checkpoint(stage, snapshot(10))
    assert str(again.value) == str(caught.value), "a restart would not recognise it as the same failure"
    set_free_space(monkeypatch, 0, total=0)  # a file system that does not report free space
    checkpoint.write_checkpoint(stage, snapshot(10))


def test_low_space_is_reported_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    needed = checkpoint.needed_bytes(snapshot(1))
    for free, warnings in ((3 * needed, 0), (3 * needed - 1, 1)):
        set_free_space(monkeypatch, free)
        caplog.clear()
        writer = Writer(tmp_path / str(free), 2, allow)
        for step in (1, 2, 3):
            writer.submit(snapshot(step))
        writer.wait()
        assert [record.levelname for record in caplog.records] == ["WARNING"] * warnings
    assert f"{tmp_path / str(3 * needed - 1)}: 3.1 MB are free and a checkpoint takes 1.0 MB" in caplog.text


def failing_fsync(monkeypatch: pytest.MonkeyPatch, code: int, times: int) -> None:
    real, left = os.fsync, iter(range(times))

    def fsync(descriptor: int) -> None:
        if next(left, None) is not None:
            raise OSError(code, os.strerror(code))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)


def test_a_persistent_error_is_raised_after_all_pauses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint.write_checkpoint(tmp_path, snapshot(5))
    pauses: list[float] = []
    writer = Writer(tmp_path, 2, allow, pauses.append)
    failing_fsync(monkeypatch, errno.ESTALE, 99)
    writer.submit(snapshot(10))
    with pytest.raises(OSError, match="Stale file handle"):
        writer.wait()
    assert pauses == list(PAUSES_S) == sorted(PAUSES_S)
    assert sum(pauses) < 60
    assert caplog.text.count("step-0000000010 failed; retrying in") == len(PAUSES_S)
    assert newest(tmp_path) == 5


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS])
def test_an_error_that_is_not_transient_is_raised_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    pauses: list[float] = []
    writer = Writer(tmp_path, 2, allow, pauses.append)
    failing_fsync(monkeypatch, code, 1)
    writer.submit(snapshot(10))
    with pytest.raises(OSError, match=os.strerror(code)):
        writer.wait()
    assert pauses == []


def test_a_retry_does_not_touch_a_successors_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lost = threading.Event()
    theirs = Snapshot({}, {}, Progress(10, 10, 100))

    def successor(_: float) -> None:
        lost.set()
        checkpoint.write_checkpoint(tmp_path, theirs, again=True)

    def guard(step: int) -> None:
        if lost.is_set():
            raise LeaseHeld("no longer ours")

    writer = Writer(tmp_path, 2, guard, successor)
    failing_fsync(monkeypatch, errno.EIO, 1)
    writer.submit(snapshot(10))
    with pytest.raises(LeaseHeld):
        writer.wait()
    assert same(checkpoint.read_checkpoint(checkpoint.folder_of(tmp_path, 10)), theirs)


def test_an_unreadable_checkpoint_does_not_count_as_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Resuming from an older one would delete it."""
    for step in (5, 10):
        checkpoint.write_checkpoint(tmp_path, snapshot(step))
    real = checkpoint.read_regular

    def read_regular(path: Path) -> bytes:
        if path == checkpoint.folder_of(tmp_path, 10) / "MANIFEST.json":
            raise OSError(errno.EACCES, "not now")
        return real(path)

    monkeypatch.setattr(checkpoint, "read_regular", read_regular)
    with pytest.raises(OSError, match="not now"):
        checkpoint.read_newest_checkpoint(tmp_path)


def fail_each_write(root: Path, code: int, stays: bool) -> None:
    """Write checkpoint 10 once for each of its file system calls, with that call failing."""
    faults, pauses, outcomes = Faults(), [], []
    for number in range(1000):
        stage = root / f"{number}"
        for step in (1, 5):
            checkpoint.write_checkpoint(stage, snapshot(step))
        pauses.clear()
        writer, error = Writer(stage, 2, allow, pauses.append), None
        faults.begin(stage, number, code, stays)
        writer.submit(snapshot(10))
        try:
            writer.wait()
        except OSError as caught:
            error = caught
        calls = faults.end()
        if calls <= number:
            assert error is None
            break
        result = checkpoint.read_newest_checkpoint(stage)
        assert result is not None
        step = result.progress.step
        assert same(result, snapshot(step))
        assert same(checkpoint.read_checkpoint(checkpoint.folder_of(stage, 5)), snapshot(5))
        if stays:  # full from this call on: older checkpoints stay, the new one is intact or absent
            assert error is None or error.errno == code, error
            assert step == 10 or (step == 5 and error is not None)
            assert pauses == []
        else:
            assert (step, error, pauses) == (10, None, [PAUSES_S[0]])
            assert (stage / "LATEST").read_text() == "step-0000000010\n"
        outcomes.append((step, error is None))
        checkpoint.delete_checkpoints_after(stage, step)  # there is space again, and the run resumes
        writer = Writer(stage, 2, allow)
        writer.submit(snapshot(15))
        writer.wait()
        assert checkpoint.steps_on_disk(stage) == [step, 15]
        assert newest(stage) == 15
        shutil.rmtree(stage)
    print(json.dumps(outcomes))


def fail_each_read(root: Path, code: int) -> None:
    """Read a checkpoint once for each of its file system calls, with that call failing once."""
    folder, faults, number = checkpoint.write_checkpoint(root, snapshot(5)), Faults(), 0
    for number in range(1000):
        pauses: list[float] = []
        faults.begin(root, number, code, False)
        result = checkpoint.read_checkpoint(folder, pauses.append)
        if faults.end() <= number:
            break
        assert same(result, snapshot(5))
        assert pauses == [PAUSES_S[0]]
    print(json.dumps(number))


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_library(tmp_path_factory.mktemp("faults"))


def under_faults(library: Path, call: str) -> Any:
    """Call a function of this file in a process that has the library preloaded; returns the JSON that it prints."""
    code = f"import errno; from pathlib import Path; from tests.unit.run import test_checkpoint as t; t.{call}"
    environment = {**os.environ, "LD_PRELOAD": str(library)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_a_disk_full_from_any_call_on_leaves_every_older_checkpoint(library: Path, tmp_path: Path) -> None:
    outcomes = under_faults(library, f"fail_each_write(Path({str(tmp_path)!r}), errno.ENOSPC, True)")
    assert len(outcomes) > 20
    assert outcomes == sorted(outcomes)  # first no checkpoint, then a checkpoint and an error, then both fine
    assert [5, False] in outcomes
    assert [10, False] in outcomes


@pytest.mark.slow
def test_a_transient_error_of_any_call_costs_one_pause(library: Path, tmp_path: Path) -> None:
    outcomes = under_faults(library, f"fail_each_write(Path({str(tmp_path)!r}), errno.EIO, False)")
    assert len(outcomes) > 30
    assert outcomes == [[10, True]] * len(outcomes)


@pytest.mark.slow
def test_reading_retries_transient_errors(library: Path, tmp_path: Path) -> None:
    assert under_faults(library, f"fail_each_read(Path({str(tmp_path)!r}), errno.ESTALE)") > 8
