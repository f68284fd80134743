"""The rows that a server gets from resumed stages, online and offline: wandb's own client and its `sync`, against a
fake server that speaks wandb's protocol."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.run.files import read_rows
from pipeline.run.tracking import wandb_mirror
from pipeline.run.tracking.metrics import truncate_rows
from tests.support.wandb_files import recorded, warnings_in
from tests.support.wandb_server import WandbServer, wandb_server
from tests.unit.run.test_metrics import ROWS, start

KEY = "0123456789" * 4


@pytest.fixture
def server(no_wandb_account: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[WandbServer]:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    with wandb_server() as running:
        monkeypatch.setenv("WANDB_BASE_URL", running.url)
        yield running


def train(folder: Path, mode: str, first: int, last: int) -> None:
    """One start: drops the rows after step 50, as on resuming from a checkpoint, then writes ROWS[first:last]."""
    folder.mkdir(exist_ok=True)
    truncate_rows(folder / "metrics.jsonl", 50)
    with start(folder, mode) as tracker:
        for row in ROWS[first:last]:
            tracker.log(row)


def assert_server_has_each_row_once(server: WandbServer, folder: Path) -> None:
    (run_id,) = server.runs
    file = read_rows(folder / "metrics.jsonl")
    rows = server.rows(run_id)
    assert [row["_step"] for row in rows] == list(range(len(file)))
    assert [row["global_step"] for row in rows] == [row["step"] for row in file]
    assert [
        any(key.startswith(f"{expected['kind']}/") for key in row) for row, expected in zip(rows, file, strict=True)
    ]


def test_a_resumed_stage_is_one_run_with_each_row_once(server: WandbServer, tmp_path: Path) -> None:
    folder = tmp_path / "stage"
    train(folder, "online", 0, 5)
    (run_id,) = server.runs
    assert len(server.rows(run_id)) == 5
    train(folder, "online", 3, 6)
    assert len(server.rows(run_id)) == 6
    assert_server_has_each_row_once(server, folder)
    assert KEY not in server.runs[run_id].config


def test_alerts_reach_the_server(server: WandbServer, tmp_path: Path) -> None:
    folder = tmp_path / "stage"
    with start(folder, "auto") as tracker:  # online, since there is a key
        tracker.alert("Run stopped", "at step 7", "WARN")
    (alert,) = server.alerts
    assert (alert["title"], alert["text"], alert["severity"]) == ("Run stopped", "at step 7", "WARN")


def test_offline_starts_are_one_run_once_they_are_synced(server: WandbServer, tmp_path: Path) -> None:
    folder = tmp_path / "stage"
    train(folder, "offline", 0, 5)
    train(folder, "offline", 3, 6)
    assert not server.runs
    assert len(recorded(folder)) == 2
    command = [sys.executable, "-m", "wandb", "sync", *map(str, sorted((folder / "wandb").glob("offline-run-*")))]
    done = subprocess.run(
        command, env={**os.environ, "WANDB_RESUME": "allow"}, cwd=tmp_path, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    assert_server_has_each_row_once(server, folder)


def test_a_later_online_start_sends_offline_rows(server: WandbServer, tmp_path: Path) -> None:
    folder = tmp_path / "stage"
    train(folder, "offline", 0, 5)
    train(folder, "online", 3, 6)
    assert_server_has_each_row_once(server, folder)
    assert len(list((folder / "wandb").glob("offline-run-*/*.wandb.synced"))) == 1


def test_offline_after_online_has_all_rows(server: WandbServer, tmp_path: Path) -> None:
    """Some rows of the online start never reached the server; offline it is unknown which."""
    folder = tmp_path / "stage"
    train(folder, "online", 0, 5)
    (run_id,) = server.runs
    del server.runs[run_id].history[4], server.runs[run_id].history[3]
    server.runs[run_id].summary["_step"] = 2
    train(folder, "offline", 3, 5)
    train(folder, "offline", 3, 6)
    second, third = (start for start in recorded(folder) if start.run_id != run_id)
    assert second.run_id == third.run_id
    assert [row["_step"] for row in second.rows + third.rows] == list(range(6))
    train(folder, "online", 3, 6)  # sends the missing rows, so that the offline files need no sync
    assert_server_has_each_row_once(server, folder)
    assert len(list((folder / "wandb").glob("offline-run-*/*.wandb.synced"))) == 2
    train(folder, "offline", 3, 6)  # has all rows, since `wandb sync` skips the earlier files
    (last,) = (start for start in recorded(folder) if start.run_id not in (run_id, second.run_id))
    assert [row["_step"] for row in last.rows] == list(range(6))


def test_rows_not_uploaded_do_not_count_as_synced(
    server: WandbServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "stage"
    train(folder, "offline", 0, 5)
    server.flows = False
    monkeypatch.setattr(wandb_mirror, "UPLOAD_SECONDS", 0.5)
    train(folder, "online", 3, 6)
    assert any("does not have all" in message for message in warnings_in(caplog))
    assert not list(folder.rglob("*.synced"))
