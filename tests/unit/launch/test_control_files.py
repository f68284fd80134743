"""Communication among the nodes of a job, and starts without progress."""

from __future__ import annotations

import stat
import time
from pathlib import Path

import pytest

from launch.slurm import control_files
from launch.slurm.control_files import ControlFiles, StartLog
from pipeline.run.layout import progress_marks


@pytest.fixture
def start(tmp_path: Path) -> ControlFiles:
    made = ControlFiles.of(tmp_path, "12", "0")
    made.create()
    made.create()
    return made


def test_only_its_user_sees_it(start: ControlFiles) -> None:
    assert stat.S_IMODE(start.folder.stat().st_mode) == 0o700


def test_addresses_belong_to_generations(start: ControlFiles) -> None:
    assert start.address(0) is None
    start.publish(0, "10.0.0.1:6379")
    assert (start.address(0), start.address(1)) == ("10.0.0.1:6379", None)


def test_lost_nodes_belong_to_generations(start: ControlFiles) -> None:
    for generation, node in ((0, 3), (0, 1), (10, 2)):
        start.mark_lost(generation, node)
    assert (start.lost_nodes(0), start.lost_nodes(1), start.lost_nodes(10)) == ([1, 3], [], [2])


def test_a_node_is_silent_when_its_last_word_is_old(start: ControlFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not start.is_silent(1, 30), "a node without a heartbeat has another deadline"
    start.beat(1)
    assert not start.is_silent(1, 30)
    later = time.time() + 31
    monkeypatch.setattr(control_files.time, "time", lambda: later)
    assert start.is_silent(1, 30)


def test_the_end_is_recorded_once(start: ControlFiles) -> None:
    assert start.ended() is None
    start.end(1, "why")
    assert start.ended() == {"code": 1, "message": "why"}


def test_a_start_knows_when_its_job_was_given_to_others(start: ControlFiles) -> None:
    assert not start.was_replaced()
    job, _, restart = start.folder.name.rpartition("-")
    (start.folder.parent / f"{job}-{int(restart) + 1}").mkdir()
    assert start.was_replaced()


def test_starts_without_progress_are_those_of_the_group_since_the_marks_changed(tmp_path: Path) -> None:
    (tmp_path / "control").mkdir()
    starts = StartLog.of(tmp_path)
    assert starts.without_progress("pretrain", "12", [0]) == 0
    for group, marks in (("pretrain", [0]), ("pretrain", [9]), ("keep-0.1", [0]), ("pretrain", [9])):
        starts.add(group, "12", "0", 2, marks)
    assert starts.without_progress("pretrain", "12", [9]) == 2
    assert starts.without_progress("pretrain", "12", [18]) == 0
    assert starts.without_progress("keep-0.1", "12", [0]) == 1
    assert starts.without_progress("pretrain", "13", [9]) == 0, "a resubmitted job starts counting from zero"
    with starts.path.open("a") as stream:
        stream.write('{"torn')
    assert len(starts.read()) == 4


def test_marks_grow_with_whatever_is_committed(tmp_path: Path) -> None:
    stage, seen = tmp_path / "pretrain", [progress_marks(tmp_path, ["pretrain"])]
    committed = ["step-0000000009/MANIFEST.json", "step-0000000018/MANIFEST.json", "result.json"]
    committed += ["evaluate/pgd.chunks/chunk-000000.parquet", "evaluate/pgd.parquet"]
    for name in committed:
        (stage / name).parent.mkdir(parents=True, exist_ok=True)
        (stage / name).touch()
        seen.append(progress_marks(tmp_path, ["pretrain"]))
    assert seen == sorted(seen)
    assert len({tuple(marks) for marks in seen}) == 6
    (stage / "step-0000000027").mkdir()  # without its manifest it does not exist
    assert progress_marks(tmp_path, ["pretrain"]) == seen[-1]
