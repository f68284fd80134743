"""metrics.jsonl is complete and exact; the real wandb client records each row once, whatever is interrupted."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.run.files import read_rows
from pipeline.run.tracking import wandb_mirror
from pipeline.run.tracking.metrics import Tracker, flatten, truncate_rows
from pipeline.run.tracking.wandb_ids import offline_id_of, run_id_of
from tests.support.commands import ROOT
from tests.support.wandb_files import Recorded, recorded, warnings_in

pytestmark = pytest.mark.usefixtures("no_wandb_account")
ROW = {
    "kind": "train",
    "step": 20,
    "epoch": 0.5,
    "lr": 0.1,
    "loss": 1.25,
    "clean_accuracy": None,
    "robust_accuracy": 0.5,
    "images": 2560,
    "timing": {"images_per_s": 2310.5, "seconds": 1.1, "system": {"node-0": {"memory_percent": 40.5}}},
}


def start(folder: Path, mode: Any = "offline", log_every_steps: int = 20, project: str = "hydra") -> Tracker:
    folder.mkdir(parents=True, exist_ok=True)
    return Tracker(
        folder,
        run_name="demo",
        stage="keep-0.1/prune",
        config={"seed": 7, "stage": {"method": "HYDRA"}},
        batch_per_step=128,
        log_every_steps=log_every_steps,
        wandb_mode=mode,
        project=project,
    )


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_rows_are_on_disk_before_finish_and_equal_what_was_logged(tmp_path: Path) -> None:
    with start(tmp_path, "disabled") as tracker:
        tracker.log(ROW)
        assert rows_of(tmp_path) == [ROW]
        tracker.log({**ROW, "step": 40})
    assert rows_of(tmp_path) == [ROW, {**ROW, "step": 40}]
    assert list(tmp_path.iterdir()) == [tmp_path / "metrics.jsonl"]


def test_a_restarted_stage_appends(tmp_path: Path) -> None:
    for step in (20, 40):
        with start(tmp_path, "disabled") as tracker:
            tracker.log({**ROW, "step": step})
    assert [row["step"] for row in rows_of(tmp_path)] == [20, 40]


def test_a_stage_that_rolls_back_drops_rows_and_continues(tmp_path: Path) -> None:
    with start(tmp_path, "disabled") as tracker:
        for step in (20, 40, 60):
            tracker.log({**ROW, "step": step})
        tracker.truncate(40)
        assert [row["step"] for row in rows_of(tmp_path)] == [20, 40]
        tracker.log({**ROW, "step": 50})
        tracker.truncate(50)  # nothing to drop
        tracker.log({**ROW, "step": 60})
    assert [row["step"] for row in rows_of(tmp_path)] == [20, 40, 50, 60]


def test_nan_is_refused_and_leaves_no_half_line(tmp_path: Path) -> None:
    with start(tmp_path, "disabled") as tracker, pytest.raises(ValueError, match="JSON"):
        tracker.log({**ROW, "loss": float("nan")})
    assert (tmp_path / "metrics.jsonl").read_bytes() == b""


def test_flatten_keeps_numbers_only() -> None:
    values = {"loss": 1, "timing": {"seconds": 2.5, "deep": {"x": True}}, "none": None, "text": "a"}
    assert flatten(values, "train/") == {"train/loss": 1.0, "train/timing/seconds": 2.5, "train/timing/deep/x": 1.0}


@settings(max_examples=50)
@given(
    steps=st.lists(st.integers(0, 30), max_size=12).map(sorted),
    last=st.integers(0, 30),
    torn=st.integers(0, 40),
)
def test_truncation_keeps_exactly_the_rows_up_to_the_step(
    tmp_path_factory: pytest.TempPathFactory, steps: list[int], last: int, torn: int
) -> None:
    path = tmp_path_factory.mktemp("truncated") / "metrics.jsonl"
    lines = [json.dumps({**ROW, "step": step}).encode() + b"\n" for step in steps]
    tail = json.dumps({**ROW, "step": 0}).encode()[:torn]
    path.write_bytes(b"".join(lines) + tail)
    dropped = truncate_rows(path, last)
    expected = [line for line, step in zip(lines, steps, strict=True) if step <= last]
    assert path.read_bytes() == b"".join(expected)
    assert dropped == len(lines) - len(expected) + bool(tail)
    assert truncate_rows(path, last) == 0
    assert [entry.name for entry in path.parent.iterdir()] == ["metrics.jsonl"]


def test_truncation_drops_a_last_line_that_parses_but_has_no_newline(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}')
    assert truncate_rows(path, 9) == 1
    assert path.read_text() == '{"step": 1}\n'


def test_truncation_drops_the_damage_of_a_power_failure(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n\x00\x00\xff\n{"step": 2}\n[3]\n{"kind": "train"}\n')
    assert truncate_rows(path, 9) == 3
    assert path.read_bytes() == b'{"step": 1}\n{"step": 2}\n'


def test_truncation_of_a_missing_file_does_nothing(tmp_path: Path) -> None:
    assert truncate_rows(tmp_path / "metrics.jsonl", 5) == 0
    assert list(tmp_path.iterdir()) == []


def train(step: int) -> dict[str, Any]:
    return {**ROW, "step": step, "epoch": step / 40, "loss": 100.0 / step}


def validation(step: int) -> dict[str, Any]:
    return {"kind": "validation", "step": step, "epoch": step / 40, "robust_accuracy": step / 100}


ROWS = [train(20), train(40), validation(40), train(60), train(80), validation(80)]


def assert_each_row_once(folder: Path, starts: list[Recorded]) -> None:
    """wandb's rows of a run, over all its starts in order, are those of the file."""
    file = [{"kind": row["kind"], "step": row["step"]} for row in read_rows(folder / "metrics.jsonl")]
    rows = [row for start in starts for row in start.rows]
    assert [row["_step"] for row in rows] == list(range(len(file)))
    for row, expected in zip(rows, file, strict=True):
        assert row["global_step"] == expected["step"]
        assert any(key.startswith(f"{expected['kind']}/") for key in row)
    assert len({start.run_id for start in starts}) == 1


def test_wandb_mirrors_offline_from_another_thread(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def stage() -> None:
        with start(tmp_path, "auto") as tracker:  # no key anywhere: auto means offline
            for row in ROWS:
                tracker.log(row)
            tracker.summary({"robust_accuracy": {"value": 0.625}, "method": "HYDRA"})

    worker = threading.Thread(target=stage)
    worker.start()
    worker.join(60)
    assert not worker.is_alive()
    assert warnings_in(caplog) == []
    (wandb_run,) = recorded(tmp_path)
    assert wandb_run.run_id == (tmp_path / "wandb" / "offline_id").read_text().strip()
    assert (wandb_run.project, wandb_run.group, wandb_run.name, wandb_run.job_type) == (
        "hydra",
        "demo",
        "keep-0.1/prune",
        "prune",
    )
    assert wandb_run.config["seed"] == 7
    assert wandb_run.config["stage"] == {"method": "HYDRA"}
    assert wandb_run.exit_code == 0
    assert_each_row_once(tmp_path, [wandb_run])
    row = wandb_run.rows[0]
    assert (row["epoch"], row["images_seen"], row["train/loss"]) == (0.5, 20 * 128, 5.0)
    assert row["train/timing/images_per_s"] == 2310.5
    assert row["system/node-0/memory_percent"] == 40.5
    assert [key for key in row if "system" in key] == ["system/node-0/memory_percent"]
    assert "train/clean_accuracy" not in row  # it was null
    assert wandb_run.rows[2]["validation/robust_accuracy"] == 0.4
    assert wandb_run.summary["robust_accuracy/value"] == 0.625
    assert wandb_run.summary["method"] == "HYDRA"
    for pattern in ("*.py", "requirements.txt", "output.log", "wandb-metadata.json"):
        assert not list((tmp_path / "wandb").rglob(pattern)), pattern


def test_the_x_axis_of_every_metric_is_in_the_rows(tmp_path: Path) -> None:
    with start(tmp_path) as tracker:
        for row in ROWS:
            tracker.log(row)
    (wandb_run,) = recorded(tmp_path)
    axes = {name: axis for name, axis in wandb_run.axes.items() if axis}
    assert axes["train/*"] == "images_seen"
    assert axes["validation/*"] == "epoch"
    assert axes["system/*"] == "images_seen"
    assert set(axes.values()) <= set(wandb_run.axes)
    for row in wandb_run.rows:
        assert {"global_step", "images_seen", "epoch"} <= set(row)


def test_a_resumed_stage_sends_only_missing_rows(tmp_path: Path) -> None:
    """The checkpoint is of step 50: rows from 60 on are dropped, and written again."""
    with start(tmp_path) as tracker:
        for row in ROWS[:-1]:
            tracker.log(row)
    truncate_rows(tmp_path / "metrics.jsonl", 50)
    with start(tmp_path) as tracker:
        for row in ROWS[3:]:
            tracker.log(row)
    first, second = recorded(tmp_path)
    assert [row["global_step"] for row in first.rows] == [20, 40, 40, 60, 80]
    assert [row["global_step"] for row in second.rows] == [80]
    assert "validation/robust_accuracy" in second.rows[0]
    assert_each_row_once(tmp_path, [first, second])


@pytest.mark.parametrize("lost", [1, 700, 3000, 10**9])
def test_rows_lost_by_a_kill_are_sent_again(tmp_path: Path, lost: int) -> None:
    """However much of wandb's file never reached the disk; the checkpoint is of step 50."""
    with start(tmp_path) as tracker:
        for row in ROWS[:-1]:
            tracker.log(row)
    (before,) = recorded(tmp_path)
    (path,) = before.folder.glob("*.wandb")
    whole = path.read_bytes()
    path.write_bytes(whole[: max(7, len(whole) - lost)])
    truncate_rows(tmp_path / "metrics.jsonl", 50)
    with start(tmp_path) as tracker:
        for row in ROWS[3:]:
            tracker.log(row)
    starts = recorded(tmp_path)
    starts[0].run_id = starts[1].run_id  # its record may be lost too
    assert_each_row_once(tmp_path, starts)
    assert starts[1].rows


def test_a_killed_process(tmp_path: Path) -> None:
    """SIGKILL while rows are in transit to wandb, whose service outlives the worker briefly."""
    rows = json.dumps(ROWS[:-1])
    code = f"""
import json, os, signal, sys, time
from pathlib import Path
from pipeline.run.tracking.wandb_history import count_recorded_rows
from tests.unit.run.test_metrics import start
folder = Path(sys.argv[1])
tracker = start(folder)
for row in json.loads({rows!r}):
    tracker.log(row)
path = folder / "wandb" / "offline_id"
while not (path.exists() and count_recorded_rows(folder / "wandb", path.read_text().strip())):
    time.sleep(0.05)
os.kill(os.getpid(), signal.SIGKILL)
"""
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, timeout=100)
    assert killed.returncode == -signal.SIGKILL
    truncate_rows(tmp_path / "metrics.jsonl", 50)
    with start(tmp_path) as tracker:
        for row in ROWS[3:]:
            tracker.log(row)
    assert_each_row_once(tmp_path, recorded(tmp_path))


def test_rows_written_while_wandb_was_disabled_are_sent(tmp_path: Path) -> None:
    with start(tmp_path, "disabled") as tracker:
        tracker.log(ROWS[0])
    with start(tmp_path) as tracker:
        tracker.log(ROWS[1])
    assert_each_row_once(tmp_path, recorded(tmp_path))


def test_a_rollback_tags_the_run_and_starts_another(tmp_path: Path) -> None:
    with start(tmp_path) as tracker:
        for row in ROWS[:5]:
            tracker.log(row)
        tracker.alert("Catastrophic overfitting", "at step 80", "WARN")
        tracker.truncate(40)
        for step in (60, 80, 100):
            tracker.log({**train(step), "attack_level": 1})
    with start(tmp_path) as tracker:  # resumes the newer run
        tracker.log(train(120))
    starts = recorded(tmp_path)
    left = [start for start in starts if start.run_id == starts[0].run_id and "went back" in start.tags]
    assert len(left) == 1
    assert [row["global_step"] for row in left[0].rows] == [20, 40, 40, 60, 80]
    assert left[0].alerts == [("Catastrophic overfitting", "at step 80", "WARN")]
    others = [start for start in starts if start.run_id != left[0].run_id]
    assert len(others) == 2
    assert others[0].tags == others[1].tags == []
    assert_each_row_once(tmp_path, others)
    assert [row.get("train/attack_level") for row in others[0].rows] == [None, None, None, 1, 1, 1]


@pytest.mark.parametrize("mode", ["offline", "disabled"])
def test_a_kill_during_a_rollback_leaves_no_id_of_a_run_with_dropped_rows(tmp_path: Path, mode: str) -> None:
    """The run is forgotten before rows are dropped, so that the thread may lag, have died or be absent."""
    with start(tmp_path) as tracker:
        for row in ROWS[:5]:
            tracker.log(row)
    tracker = start(tmp_path, mode)
    tracker._mirror, late = None, tracker._mirror  # its thread's part of the rollback never runs
    tracker.truncate(40)
    tracker.finish()
    if late is not None:
        late.finish()
    with start(tmp_path) as tracker:
        for step in (60, 80, 100):
            tracker.log({**train(step), "attack_level": 1})
    starts = recorded(tmp_path)
    assert starts[-1].run_id != starts[0].run_id
    assert_each_row_once(tmp_path, starts[-1:])


def test_a_rollback_before_wandb_has_started_starts_another_run_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """An error of the abandoned run does not prevent the start of the next one."""
    go, real = threading.Event(), wandb_mirror._start
    ends: list[str] = []

    def slow(*arguments: Any) -> Any:
        go.wait(60)
        return real(*arguments)

    def fail(run: Any, *_: Any) -> None:
        ends.append(run.id)
        run.finish()
        if len(ends) == 1:
            raise TimeoutError("Timed out finishing run.")

    monkeypatch.setattr(wandb_mirror, "_start", slow)
    monkeypatch.setattr(wandb_mirror, "_end", fail)
    with start(tmp_path) as tracker:
        for row in ROWS[:5]:
            tracker.log(row)
        tracker.truncate(40)
        tracker.log(train(60))
        go.set()
    (message,) = warnings_in(caplog)
    assert "does not have all of the abandoned run" in message
    left, other = recorded(tmp_path)
    assert (left.run_id, left.tags) == (ends[0], ["went back"])
    assert left.run_id != other.run_id
    assert_each_row_once(tmp_path, [other])


@pytest.mark.parametrize("change", [{"log_every_steps": 5}, {"project": "other"}])
def test_another_cadence_or_project_is_another_run(tmp_path: Path, change: dict[str, Any]) -> None:
    """Killed at step 95 with a checkpoint of step 50; row 8 was that of step 90 and becomes that of step 70."""
    with start(tmp_path) as tracker:
        for step in range(10, 95, 10):
            tracker.log(train(step))
    truncate_rows(tmp_path / "metrics.jsonl", 50)
    with start(tmp_path, **change) as tracker:
        for step in range(55, 100, 5):
            tracker.log(train(step))
    first, second = recorded(tmp_path)
    assert first.run_id != second.run_id
    assert_each_row_once(tmp_path, [second])


def test_a_change_of_cadence_while_wandb_is_disabled_counts(tmp_path: Path) -> None:
    for mode, every, first, last in (("offline", 10, 10, 90), ("disabled", 5, 55, 70), ("offline", 10, 80, 100)):
        truncate_rows(tmp_path / "metrics.jsonl", first - every)
        with start(tmp_path, mode, log_every_steps=every) as tracker:
            for step in range(first, last + 1, every):
                tracker.log(train(step))
    _, second = recorded(tmp_path)
    assert_each_row_once(tmp_path, [second])


def test_a_failed_stage_has_exit_code_1_in_wandb(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), start(tmp_path):
        raise RuntimeError
    (wandb_run,) = recorded(tmp_path)
    assert wandb_run.exit_code == 1


def test_finishing_twice_and_a_mirror_that_never_started(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "wandb").write_text("a file where wandb's folder should be")
    with start(tmp_path) as tracker:
        for row in ROWS:
            tracker.log(row)
        tracker.alert("title", "text", "INFO")
        tracker.summary({"a": 1})
        tracker.finish()
    assert read_rows(tmp_path / "metrics.jsonl") == ROWS
    (message,) = warnings_in(caplog)
    assert "wandb stopped; the run continues" in message


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\n", b"../../elsewhere\n", b"\n\n"])
def test_a_damaged_id_is_made_anew(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb" / "run_id").write_bytes(content)
    run_id = run_id_of(tmp_path, "rows")
    assert re.fullmatch("[0-9a-f]{16}", run_id)
    (tmp_path / "wandb" / "offline_id").write_bytes(content)
    assert re.fullmatch(f"{run_id}-[0-9a-f]{{8}}", offline_id_of(tmp_path, run_id))
    assert run_id_of(tmp_path, "rows") == run_id
