"""metrics.jsonl is whole and exact; wandb, the real one, mirrors it and can fail without anybody noticing."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import wandb
from hypothesis import given, settings
from hypothesis import strategies as st
from wandb.sdk.lib import wbauth

from pipeline import tracking
from pipeline.tracking import Tracker, cut_rows, flatten

ROW = {
    "kind": "train",
    "step": 20,
    "epoch": 0.5,
    "lr": 0.1,
    "loss": 1.25,
    "clean_accuracy": None,
    "robust_accuracy": 0.5,
    "images": 2560,
    "timing": {"images_per_s": 2310.5, "seconds": 1.1},
}


@pytest.fixture(autouse=True)
def _no_account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Nobody's key, settings or mode reach the tests, nor those of one test the next; wandb's service is ended."""
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no_netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "wandb_config"))
    yield
    wbauth.unauthenticate_session()
    wandb.teardown()


def warnings_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "pipeline.tracking"]


def start(folder: Path, mode: Any = "offline") -> Tracker:
    folder.mkdir(parents=True, exist_ok=True)
    return Tracker(
        folder, run_name="demo", stage="keep-0.1/prune", recipe_dict={"seed": 7}, wandb_mode=mode, project="hydra"
    )


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def wandb_bytes(folder: Path) -> bytes:
    """What all wandb runs of the stage recorded: protobuf, uncompressed, so that its strings can be looked for."""
    wandb.teardown()  # run.finish() may return a moment before the service has written the last rows
    return b"".join(path.read_bytes() for path in sorted((folder / "wandb").glob("offline-run-*/*.wandb")))


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


def test_a_stage_that_goes_back_drops_rows_and_goes_on(tmp_path: Path) -> None:
    with start(tmp_path, "disabled") as tracker:
        for step in (20, 40, 60):
            tracker.log({**ROW, "step": step})
        tracker.cut(40)
        assert [row["step"] for row in rows_of(tmp_path)] == [20, 40]
        tracker.log({**ROW, "step": 50})
        tracker.cut(50)  # nothing to drop
        tracker.log({**ROW, "step": 60})
    assert [row["step"] for row in rows_of(tmp_path)] == [20, 40, 50, 60]


def test_nan_is_refused_and_leaves_no_half_line(tmp_path: Path) -> None:
    with start(tmp_path, "disabled") as tracker, pytest.raises(ValueError, match="JSON"):
        tracker.log({**ROW, "loss": float("nan")})
    assert (tmp_path / "metrics.jsonl").read_bytes() == b""


def test_flatten_keeps_numbers_only() -> None:
    values = {"loss": 1, "timing": {"seconds": 2.5, "deep": {"x": True}}, "none": None, "text": "a"}
    assert flatten(values, "train/") == {"train/loss": 1.0, "train/timing/seconds": 2.5, "train/timing/deep/x": 1.0}


@settings(deadline=None, max_examples=50)
@given(
    steps=st.lists(st.integers(0, 30), max_size=12).map(sorted),
    cut=st.integers(0, 30),
    torn=st.integers(0, 40),
)
def test_cut_keeps_exactly_the_rows_up_to_the_step(
    tmp_path_factory: pytest.TempPathFactory, steps: list[int], cut: int, torn: int
) -> None:
    path = tmp_path_factory.mktemp("cut") / "metrics.jsonl"
    lines = [json.dumps({**ROW, "step": step}).encode() + b"\n" for step in steps]
    tail = json.dumps({**ROW, "step": 0}).encode()[:torn]
    path.write_bytes(b"".join(lines) + tail)
    dropped = cut_rows(path, cut)
    expected = [line for line, step in zip(lines, steps, strict=True) if step <= cut]
    assert path.read_bytes() == b"".join(expected)
    assert dropped == len(lines) - len(expected) + bool(tail)
    assert cut_rows(path, cut) == 0
    assert [entry.name for entry in path.parent.iterdir()] == ["metrics.jsonl"]


def test_cut_drops_a_last_line_that_parses_but_has_no_newline(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}')
    assert cut_rows(path, 9) == 1
    assert path.read_text() == '{"step": 1}\n'


def test_cut_survives_what_a_power_cut_leaves(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n\x00\x00\xff\n{"step": 2}\n[3]\n{"kind": "train"}\n')
    assert cut_rows(path, 9) == 3
    assert path.read_bytes() == b'{"step": 1}\n{"step": 2}\n'


def test_cut_of_a_missing_file_is_nothing(tmp_path: Path) -> None:
    assert cut_rows(tmp_path / "metrics.jsonl", 5) == 0
    assert list(tmp_path.iterdir()) == []


def test_wandb_mirrors_offline_from_another_thread_and_is_resumed_by_its_id(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def stage() -> None:
        with start(tmp_path, "auto") as tracker:  # no key anywhere: auto means offline
            tracker.log(ROW)
            tracker.summary({"robust_accuracy": {"value": 0.625}})

    for _ in range(2):
        worker = threading.Thread(target=stage)
        worker.start()
        worker.join(60)
        assert not worker.is_alive()
    assert warnings_in(caplog) == []
    run_id = (tmp_path / "wandb" / "run_id").read_text().strip()
    recorded = sorted((tmp_path / "wandb").glob("offline-run-*"))
    assert len(recorded) == 2
    assert all(f"-{run_id}" in folder.name for folder in recorded)
    data = wandb_bytes(tmp_path)
    for text in (b"global_step", b"train/timing/images_per_s", b"2310.5", b"robust_accuracy/value", b"0.625"):
        assert text in data, text
    for text in (b"demo", b"keep-0.1/prune", b"prune", b"hydra", b"seed"):
        assert text in data, text
    assert b"clean_accuracy" not in data  # it was null
    assert not list((tmp_path / "wandb").rglob("*.py"))
    assert not list((tmp_path / "wandb").rglob("requirements.txt"))
    assert not list((tmp_path / "wandb").rglob("output.log"))


def test_an_unreachable_server_means_offline_and_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("WANDB_API_KEY", "0123456789" * 4)
    monkeypatch.setattr(tracking, "INIT_SECONDS", 2.0)
    with start(tmp_path, "online") as tracker:
        tracker.log(ROW)
    assert rows_of(tmp_path) == [ROW]
    (message,) = warnings_in(caplog)
    assert "keep-0.1/prune is recorded offline" in message
    assert "\n" not in message
    assert b"train/timing/images_per_s" in wandb_bytes(tmp_path)


def test_online_without_a_key_means_offline(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with start(tmp_path, "online") as tracker:
        tracker.log(ROW)
    (message,) = warnings_in(caplog)
    assert "API key" in message
    assert b"train/timing/images_per_s" in wandb_bytes(tmp_path)


def test_a_wandb_that_cannot_start_leaves_the_metrics_whole(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "wandb").write_text("a file where wandb's folder should be")
    with start(tmp_path) as tracker:
        for step in range(5):
            tracker.log({**ROW, "step": step})
    assert [row["step"] for row in rows_of(tmp_path)] == [0, 1, 2, 3, 4]
    (message,) = warnings_in(caplog)
    assert "metrics.jsonl goes on" in message


def test_finish_does_not_wait_for_a_mirror_that_hangs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    release = threading.Event()

    def hang(*_: Any) -> None:
        release.wait(60)
        raise RuntimeError("released")

    monkeypatch.setattr(tracking, "_start", hang)
    monkeypatch.setattr(tracking, "FINISH_SECONDS", 0.05)
    tracker = start(tmp_path)
    tracker.log(ROW)
    tracker.finish()
    assert "did not finish" in caplog.text
    assert rows_of(tmp_path) == [ROW]
    release.set()
    mirror = tracker._mirror
    assert mirror is not None
    mirror.join(60)
    assert not mirror.is_alive()
    tracker.finish()


@pytest.mark.parametrize(("variable", "mode"), [("WANDB_API_KEY", "online"), (None, "offline")])
def test_auto_is_online_exactly_with_a_key(monkeypatch: pytest.MonkeyPatch, variable: str | None, mode: str) -> None:
    if variable:
        monkeypatch.setenv(variable, "0123456789" * 4)
    assert tracking._choose_mode() == mode


def test_auto_finds_a_netrc_key_and_obeys_wandb_mode(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text(f"machine api.wandb.ai login user password {'0123456789' * 4}\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    assert tracking._choose_mode() == "online"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert tracking._choose_mode() == "disabled"
