"""Resuming a stage: from its newest complete checkpoint, and only while holding its lease."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from pipeline.run import checkpoint
from pipeline.run.checkpoint import Snapshot
from pipeline.run.lease import LeaseHeld, Leases
from pipeline.run.progress import Progress
from pipeline.training.stage import _own_checkpoint

ROWS = "".join(json.dumps({"kind": "train", "step": step}) + "\n" for step in (5, 10, 15))


def stage_with_checkpoints(folder: Path) -> Path:
    for step in (5, 10):
        checkpoint.write_checkpoint(
            folder, Snapshot({"weight/w": torch.full((2,), float(step))}, {}, Progress(step, 10, 100))
        )
    (folder / "metrics.jsonl").write_text(ROWS)
    return folder


def everything(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_newest_complete_checkpoint_is_used_and_later_steps_are_removed(tmp_path: Path) -> None:
    folder = stage_with_checkpoints(tmp_path / "pretrain")
    (checkpoint.folder_of(folder, 10) / "model.safetensors").write_bytes(b"")
    leases = Leases([folder])
    own = _own_checkpoint(folder, leases.token)
    leases.release()
    assert own is not None
    assert own.progress.step == 5
    assert checkpoint.steps_on_disk(folder) == [5]
    assert (folder / "metrics.jsonl").read_text() == ROWS.splitlines(keepends=True)[0]


def test_without_a_complete_checkpoint_the_run_stops_and_nothing_is_lost(tmp_path: Path) -> None:
    folder = stage_with_checkpoints(tmp_path / "pretrain")
    for step in (5, 10):
        (checkpoint.folder_of(folder, step) / "model.safetensors").write_bytes(b"")
    leases = Leases([folder])
    before = everything(folder)
    with pytest.raises(ValueError, match=r"none of its checkpoints is intact \(steps 5, 10;.* delete its step-"):
        _own_checkpoint(folder, leases.token)
    assert everything(folder) == before
    for step in (5, 10):  # without a manifest they were never complete, so nothing is lost
        (checkpoint.folder_of(folder, step) / "MANIFEST.json").unlink()
    assert _own_checkpoint(folder, leases.token) is None
    leases.release()
    assert checkpoint.steps_on_disk(folder) == []


def test_a_process_without_the_lease_removes_nothing(tmp_path: Path) -> None:
    folder = stage_with_checkpoints(tmp_path / "pretrain")
    (checkpoint.folder_of(folder, 15)).mkdir()  # being written by the lease's new holder
    leases = Leases([folder])
    before = everything(folder)
    with pytest.raises(LeaseHeld, match="is no longer ours"):
        _own_checkpoint(folder, "of the start before")
    assert everything(folder) == before
    assert checkpoint.steps_on_disk(folder) == [5, 10, 15]
    leases.release()
