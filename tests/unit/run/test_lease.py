"""Leases: one writer per stage, however processes start, die, freeze or race."""

from __future__ import annotations

import errno
import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from pipeline.run import disk, lease
from pipeline.run.lease import STALE_AFTER_S, LeaseHeld, Leases, check_token, read_holder
from pipeline.run.locks import exclusive

DEADLINE_S = 60


@contextmanager
def other_process() -> Iterator[subprocess.Popen[bytes]]:
    """A living process that does nothing."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        yield process
    finally:
        process.kill()
        process.communicate(timeout=DEADLINE_S)


def hold(folder: Path, **facts: Any) -> None:
    """Write a lease as another process would have."""
    record = {"token": "other", "host": socket.gethostname(), "pid": os.getpid(), "started_ticks": 0}
    (folder / "lease.json").write_text(json.dumps({**record, "heartbeat": time.time(), **facts}))


def ticks(pid: int) -> int:
    value = lease._started_ticks(pid)
    assert value is not None
    return value


def test_a_lease_is_acquired_and_released(tmp_path: Path) -> None:
    folders = [tmp_path / "pretrain", tmp_path / "keep-0.1" / "prune"]
    leases = Leases(folders)
    for folder in folders:
        holder = read_holder(folder)
        assert holder is not None
        assert (holder.token, holder.host, holder.pid) == (leases.token, socket.gethostname(), os.getpid())
        check_token(folder, leases.token)
    leases.release()
    leases.release()
    for folder in folders:
        assert read_holder(folder) is None
        with pytest.raises(LeaseHeld, match=re.escape(f"{folder} is no longer ours (held by nobody)")):
            check_token(folder, leases.token)


def test_a_refusal_names_the_living_holder(tmp_path: Path) -> None:
    leases = Leases([tmp_path])
    with pytest.raises(LeaseHeld, match=rf"{tmp_path} is being written by pid {os.getpid()} on {socket.gethostname()}"):
        Leases([tmp_path])
    check_token(tmp_path, leases.token)  # the refused start changed nothing
    leases.release()
    with other_process() as process:
        hold(tmp_path, pid=process.pid, started_ticks=ticks(process.pid))
        with pytest.raises(LeaseHeld, match=f"pid {process.pid} on "):
            Leases([tmp_path])


def test_a_refused_start_releases_what_it_had_acquired(tmp_path: Path) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    holder = Leases([second])
    with pytest.raises(LeaseHeld, match=str(second)):
        Leases([first, second])
    assert read_holder(first) is None
    check_token(second, holder.token)
    holder.release()


def test_the_lease_of_a_dead_process_is_taken_over_at_once(tmp_path: Path) -> None:
    with other_process() as process:
        hold(tmp_path, pid=process.pid, started_ticks=ticks(process.pid))
    leases = Leases([tmp_path])
    check_token(tmp_path, leases.token)
    with pytest.raises(LeaseHeld, match=f"no longer ours .held by pid {os.getpid()} on "):
        check_token(tmp_path, "other")
    leases.release()


def test_a_zombie_is_dead(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    hold(tmp_path, pid=process.pid, started_ticks=ticks(process.pid))
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # it has ended and is not reaped
    Leases([tmp_path]).release()
    process.communicate(timeout=DEADLINE_S)


def test_another_process_under_the_same_pid_is_not_the_holder(tmp_path: Path) -> None:
    hold(tmp_path, started_ticks=ticks(os.getpid()) - 1)
    Leases([tmp_path]).release()


@pytest.mark.parametrize(("age", "stale"), [(0, False), (0.5 * STALE_AFTER_S, False), (1.1 * STALE_AFTER_S, True)])
def test_a_holder_on_another_host_is_stale_by_its_heartbeat_alone(tmp_path: Path, age: float, stale: bool) -> None:
    hold(tmp_path, host="elsewhere", heartbeat=time.time() - age)
    if stale:
        Leases([tmp_path]).release()
    else:
        with pytest.raises(LeaseHeld, match=rf"pid {os.getpid()} on elsewhere; wait for it"):
            Leases([tmp_path])


@pytest.mark.parametrize("content", ["", '{"token"', "[]", '{"token": "x"}'])
def test_a_damaged_lease_is_taken_over(tmp_path: Path, content: str) -> None:
    (tmp_path / "lease.json").write_text(content)
    Leases([tmp_path]).release()


def test_a_replaced_holder_releases_nothing(tmp_path: Path) -> None:
    leases = Leases([tmp_path])
    hold(tmp_path)
    leases.release()
    holder = read_holder(tmp_path)
    assert holder is not None
    assert holder.token == "other"


def test_the_heartbeat_advances(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "HEARTBEAT_S", 0.01)
    leases = Leases([tmp_path])
    beats, deadline = set(), time.monotonic() + DEADLINE_S
    while len(beats) < 3:
        assert time.monotonic() < deadline
        holder = read_holder(tmp_path)
        assert holder is not None
        beats.add(holder.heartbeat)
    leases.release()
    assert not leases._thread.is_alive()


def test_a_lost_lease_is_logged_and_left_to_its_new_holder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(lease, "HEARTBEAT_S", 0.01)
    leases = Leases([tmp_path])
    with exclusive(tmp_path / ".lease.lock"):
        hold(tmp_path, host="elsewhere")
    leases._thread.join(DEADLINE_S)  # it ends once it has no lease to renew
    assert not leases._thread.is_alive()
    assert f"lease lost; this process writes no more checkpoints of this stage: {tmp_path}" in caplog.text
    assert "on elsewhere" in caplog.text
    leases.release()
    holder = read_holder(tmp_path)
    assert holder is not None
    assert holder.host == "elsewhere"


def test_a_heartbeat_that_cannot_be_written_is_logged_and_retried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(lease, "HEARTBEAT_S", 0.01)
    write, failures = lease.atomic_write_json, iter(range(3))

    def failing(path: Path, value: Any) -> None:
        if next(failures, None) is not None:
            raise OSError(5, "Input/output error")
        write(path, value)

    leases = Leases([tmp_path])
    before = read_holder(tmp_path)
    monkeypatch.setattr(lease, "atomic_write_json", failing)
    deadline = time.monotonic() + DEADLINE_S
    while read_holder(tmp_path) == before:
        assert time.monotonic() < deadline
    leases.release()
    assert caplog.text.count("could not be renewed") == 3
    assert "Input/output error" in caplog.text


RACER = """
import sys
from pathlib import Path
from pipeline.run.lease import LeaseHeld, Leases
print("ready", flush=True)
input()
try:
    leases = Leases([Path(sys.argv[1])])
except LeaseHeld:
    print("refused", flush=True)
else:
    print("holds", flush=True)
    input()
    leases.release()
"""


def test_of_racing_processes_exactly_one_wins(tmp_path: Path) -> None:
    """Twice: with a dead writer's lease, and without a lease."""
    with other_process() as process:
        hold(tmp_path, pid=process.pid, started_ticks=ticks(process.pid))
    for _ in range(2):
        command = [sys.executable, "-c", RACER, str(tmp_path)]
        root = Path(__file__).parents[3]
        racers = [
            subprocess.Popen(command, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in "abc"
        ]
        try:
            for racer in racers:
                assert racer.stdout is not None
                assert racer.stdout.readline() == "ready\n"
            for racer in racers:
                assert racer.stdin is not None
                racer.stdin.write("go\n")
                racer.stdin.flush()
            answers = [racer.stdout.readline().strip() for racer in racers if racer.stdout is not None]
            assert sorted(answers) == ["holds", "refused", "refused"]
            holder = read_holder(tmp_path)
            assert holder is not None
            assert holder.pid == racers[answers.index("holds")].pid
            for racer in racers:
                racer.communicate("done\n" if racer.poll() is None else None, timeout=DEADLINE_S)
                assert racer.returncode == 0
        finally:
            for racer in racers:
                racer.kill()
                racer.communicate(timeout=DEADLINE_S)
        assert read_holder(tmp_path) is None


def test_a_transient_file_system_error_does_not_lose_the_lease(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leases = Leases([tmp_path])
    read, failures = lease.read_json, [errno.EIO, errno.ESTALE]

    def failing(path: Path) -> Any:
        if failures:
            raise OSError(failures.pop(), "the server is away")
        return read(path)

    monkeypatch.setattr(lease, "read_json", failing)
    monkeypatch.setattr(disk, "PAUSES_S", (0.0, 0.0))
    check_token(tmp_path, leases.token)
    assert failures == []
    leases.release()
