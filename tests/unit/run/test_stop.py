"""Stop files, the watchdog, and repeated failures."""

from __future__ import annotations

import errno
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from pipeline.run import failures
from pipeline.run import stop as stop_module
from pipeline.run.failures import Failure, read_failures, record_failure, repeated_failure
from pipeline.run.stop import StopFile
from pipeline.training.watchdog import EXIT_HUNG, Watchdog
from tests.support.commands import ROOT


def test_a_stop_file_counts_even_after_it_is_deleted(tmp_path: Path) -> None:
    path = tmp_path / "stop"
    stop = StopFile(path, poll_s=0.0)
    assert not stop.requested()
    path.touch()
    assert stop.requested()
    path.unlink()
    assert stop.requested()
    assert not StopFile(None).requested()


def test_the_stop_file_is_polled_at_an_interval(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(stop_module.time, "monotonic", lambda: now)
    path = tmp_path / "stop"
    stop = StopFile(path, poll_s=3.0)
    assert not stop.requested()
    path.touch()
    now += 2.0
    assert not stop.requested(), "it checked again at once"
    now += 1.0
    assert stop.requested()


def test_the_watchdog_ends_a_hung_process_and_logs_its_stack(tmp_path: Path) -> None:
    code = textwrap.dedent(f"""
        import threading
        from pathlib import Path
        from pipeline.training.watchdog import Watchdog
        watchdog = Watchdog(0.4, Path({str(tmp_path / "log")!r}))
        def the_place_where_it_hangs():
            threading.Event().wait(60)
        the_place_where_it_hangs()
    """)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=240, check=False)
    assert done.returncode == EXIT_HUNG
    assert "the_place_where_it_hangs" in (tmp_path / "log").read_text()


def test_a_closed_watchdog_does_nothing(tmp_path: Path) -> None:
    watchdog = Watchdog(5.0, tmp_path / "log")
    watchdog.beat()
    watchdog.close()
    assert not (tmp_path / "log").exists()


def failure(attempt: str, step: int = 7, error: str = "NonFinite: nan", rank: int = 0) -> Failure:
    return Failure(attempt, rank, "pretrain", step, error)


def run_with(folder: Path, *failures: Failure) -> Path:
    (folder / "logs").mkdir(exist_ok=True)
    for one in failures:
        record_failure(folder, one)
    return folder


def test_failures_are_read_as_written_and_damaged_lines_are_skipped(tmp_path: Path) -> None:
    failures = [failure("a"), failure("b", 9, "OSError: äöü", 3)]
    run_with(tmp_path, *failures)
    with (tmp_path / "logs" / "failures.jsonl").open("a") as stream:
        stream.write('{"attempt": "c", "ra')
    assert read_failures(tmp_path) == failures
    assert read_failures(tmp_path / "nowhere") == []


def test_the_same_failure_in_two_attempts_in_a_row_is_repeated(tmp_path: Path) -> None:
    assert repeated_failure(run_with(tmp_path, failure("a")), "a") is None
    assert repeated_failure(run_with(tmp_path, failure("b", rank=1)), "b") == failure("b", rank=1)
    assert repeated_failure(tmp_path, "c") is None, "this attempt has no recorded failure"


@pytest.mark.parametrize("other", [failure("b", step=8), failure("b", error="OSError: disk")])
def test_another_step_or_another_error_is_not_a_repetition(tmp_path: Path, other: Failure) -> None:
    assert repeated_failure(run_with(tmp_path, failure("a"), other), "b") is None
    assert repeated_failure(run_with(tmp_path, failure("c")), "c") is None, "only attempts in a row count"


def test_two_ranks_of_one_attempt_are_not_a_repetition(tmp_path: Path) -> None:
    assert repeated_failure(run_with(tmp_path, failure("a", rank=0), failure("a", rank=1)), "a") is None


def test_a_failure_that_cannot_be_recorded_is_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(failures, "open_to_append", full)
    record_failure(tmp_path, failure("a"))
    assert "NonFinite: nan" in caplog.text
    assert "No space left on device" in caplog.text
