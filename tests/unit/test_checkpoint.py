"""Checkpoints: whole or not there, every damage noticed, a bounded number kept, errors not lost in a thread."""

from __future__ import annotations

import logging
import os
import shutil
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline import checkpoint
from pipeline.checkpoint import CheckpointDamaged, Snapshot, Writer
from pipeline.files import read_json
from pipeline.lease import LeaseHeld
from pipeline.progress import Progress, Window

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

    return equal(a.model, b.model) and equal(a.optimizer, b.optimizer) and a.progress == b.progress


def newest(stage: Path) -> int | None:
    found = checkpoint.read_newest(stage)
    return None if found is None else found.progress.step


def allow(step: int) -> None:
    """A guard that refuses nothing."""


def test_a_checkpoint_comes_back_as_it_was(tmp_path: Path) -> None:
    folder = checkpoint.write(tmp_path, snapshot(7))
    assert same(checkpoint.read(folder), snapshot(7))
    assert not same(checkpoint.read(folder), snapshot(8))
    assert sorted(os.listdir(folder)) == sorted(FILES)
    assert (tmp_path / "LATEST").read_text() == "step-0000000007\n"
    checkpoint.write(tmp_path, snapshot(12))
    assert (tmp_path / "LATEST").read_text() == "step-0000000012\n"
    assert newest(tmp_path) == checkpoint.newest_step(tmp_path) == 12


def test_an_empty_stage_has_no_checkpoint(tmp_path: Path) -> None:
    for stage in (tmp_path, tmp_path / "absent"):
        assert newest(stage) is None
        assert checkpoint.newest_step(stage) == 0


def test_without_manifest_it_does_not_exist(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    checkpoint.write(tmp_path, snapshot(5))
    (checkpoint.write(tmp_path, snapshot(10)) / "MANIFEST.json").unlink()
    assert checkpoint.newest_step(tmp_path) == 5
    assert newest(tmp_path) == 5
    assert "step-0000000010 was being written" in caplog.text
    checkpoint.write(tmp_path, snapshot(10))  # the resumed run comes by again
    assert newest(tmp_path) == 10


def test_who_was_replaced_while_frozen_does_not_touch_its_successors_checkpoint(tmp_path: Path) -> None:
    checkpoint.write(tmp_path, snapshot(5))
    other = Snapshot({}, {}, Progress(5, 10, 100))
    with pytest.raises(FileExistsError, match="step-0000000005 is there already, so another process writes"):
        checkpoint.write(tmp_path, other)
    assert newest(tmp_path) == 5


def test_the_manifest_is_the_last_file(tmp_path: Path) -> None:
    seen: list[set[str]] = []
    folder = checkpoint.folder_of(tmp_path, 5)
    checkpoint.write(tmp_path, snapshot(5), lambda: seen.append({path.name for path in folder.iterdir()}))
    assert seen == [set(checkpoint.CONTENT)]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stage with checkpoints of steps 5 and 10."""
    stage = tmp_path_factory.mktemp("stage")
    for step in (5, 10):
        checkpoint.write(stage, snapshot(step))
    return stage


@settings(
    deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(name=st.sampled_from(FILES), where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), cut=st.booleans())
def test_every_flipped_bit_and_every_cut_is_noticed(pair: Path, name: str, where: float, bit: int, cut: bool) -> None:
    path = checkpoint.folder_of(pair, 10) / name
    whole = path.read_bytes()
    place = int(where * len(whole))
    changed = whole[:place] if cut else whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :]
    if cut and name == "MANIFEST.json" and changed.rstrip() == whole.rstrip():
        return  # only the newline behind it is gone
    try:
        path.write_bytes(changed)
        with pytest.raises(CheckpointDamaged, match="step-0000000010"):
            checkpoint.check(path.parent)
        assert newest(pair) == 5
    finally:
        path.write_bytes(whole)
    checkpoint.check(path.parent)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_noticed_and_named(pair: Path, tmp_path: Path, name: str) -> None:
    stage = tmp_path / "stage"
    shutil.copytree(pair, stage)
    (checkpoint.folder_of(stage, 10) / name).unlink()
    with pytest.raises(CheckpointDamaged, match=name):
        checkpoint.read(checkpoint.folder_of(stage, 10))
    assert newest(stage) == 5


def test_what_is_damaged_is_passed_over_loudly(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folders = [checkpoint.write(tmp_path, snapshot(step)) for step in (5, 10, 15)]
    (folders[2] / "model.safetensors").write_bytes(b"")
    os.replace(folders[0] / "train_state.safetensors", folders[1] / "train_state.safetensors")  # whole, but another's
    with caplog.at_level(logging.ERROR):
        assert newest(tmp_path) is None
    assert [record.levelname for record in caplog.records] == ["ERROR"] * 3
    for step in (5, 10, 15):
        assert f"step-{step:010d}" in caplog.text


def test_a_folder_under_another_step_is_not_that_checkpoint(tmp_path: Path) -> None:
    checkpoint.write(tmp_path, snapshot(5)).rename(checkpoint.folder_of(tmp_path, 9))
    assert newest(tmp_path) is None


@pytest.mark.parametrize(
    ("keep", "protected", "left"),
    [(2, None, [4, 5]), (2, 1, [1, 4, 5]), (1, 5, [4, 5]), (1, 2, [2, 5]), (9, None, [1, 2, 3, 4, 5])],
)
def test_the_newest_and_the_best_are_kept(tmp_path: Path, keep: int, protected: int | None, left: list[int]) -> None:
    for step in range(1, 6):
        checkpoint.write(tmp_path, snapshot(step))
    checkpoint.prune(tmp_path, keep, protected)
    assert checkpoint.steps_on_disk(tmp_path) == left
    for step in left:
        checkpoint.check(checkpoint.folder_of(tmp_path, step))


def test_what_lies_beyond_the_resumed_step_goes(tmp_path: Path) -> None:
    for step in (5, 10, 15):
        checkpoint.write(tmp_path, snapshot(step))
    checkpoint.discard_after(tmp_path, 10)
    assert checkpoint.steps_on_disk(tmp_path) == [5, 10]
    checkpoint.discard_after(tmp_path, 0)
    assert checkpoint.steps_on_disk(tmp_path) == []
    checkpoint.discard_after(tmp_path / "absent", 0)


def test_other_folders_are_left_alone(tmp_path: Path) -> None:
    for name in ("evaluate", "step-1", "step-0000000001x", "wandb"):
        (tmp_path / name).mkdir()
    checkpoint.discard_after(tmp_path, 0)
    checkpoint.prune(tmp_path, 1, None)
    assert len(os.listdir(tmp_path)) == 4


def test_the_writer_prunes_and_its_checkpoints_are_there_after_wait(tmp_path: Path) -> None:
    writer = Writer(tmp_path, 2, allow)
    for step in (1, 2, 3, 4):
        writer.submit(snapshot(step, best_step=1))
    writer.wait()
    writer.wait()
    assert checkpoint.steps_on_disk(tmp_path) == [1, 3, 4]
    assert newest(tmp_path) == 4


def test_submit_does_not_wait_for_the_disk_and_never_writes_two_at_once(tmp_path: Path) -> None:
    begun, go = threading.Event(), threading.Event()
    active, overlapping = [], []

    def guard(step: int) -> None:
        active.append(step)
        overlapping.append(len(active))
        begun.set()
        assert go.wait(DEADLINE_S)
        active.remove(step)

    writer = Writer(tmp_path, 2, guard)
    writer.submit(snapshot(1))  # returns while the guard still holds the manifest back
    assert begun.wait(DEADLINE_S)
    assert checkpoint.newest_step(tmp_path) == 0
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
    writer.wait()  # it was reported once


def test_a_refusing_guard_leaves_no_checkpoint(tmp_path: Path) -> None:
    checkpoint.write(tmp_path, snapshot(1))

    def refuse(step: int) -> None:
        raise LeaseHeld(f"not yours at {step}")

    writer = Writer(tmp_path, 1, refuse)
    writer.submit(snapshot(2))
    with pytest.raises(LeaseHeld, match="not yours at 2"):
        writer.wait()
    assert newest(tmp_path) == checkpoint.newest_step(tmp_path) == 1
    assert (tmp_path / "LATEST").read_text() == "step-0000000001\n"


def test_the_manifest_says_sizes_and_hashes(tmp_path: Path) -> None:
    folder = checkpoint.write(tmp_path, snapshot(3))
    manifest = read_json(folder / "MANIFEST.json")
    assert (manifest["step"], sorted(manifest["files"])) == (3, sorted(checkpoint.CONTENT))
    for name, facts in manifest["files"].items():
        assert facts["bytes"] == (folder / name).stat().st_size
