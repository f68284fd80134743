"""File locks: one holder at a time, among processes and within one, released when the holder ends."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pipeline.run import locks
from pipeline.run.locks import exclusive, lock, try_lock

DEADLINE_S = 60
HOLDS = """
import sys
from pathlib import Path
from pipeline.run.locks import exclusive
with exclusive(Path(sys.argv[1])):
    print("held", flush=True)
    input()
print("released", flush=True)
"""


@contextmanager
def held_elsewhere(path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process holds the lock until it reads a line or is killed."""
    command = [sys.executable, "-c", HOLDS, str(path)]
    with subprocess.Popen(command, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "held\n"
            yield process
        finally:
            process.kill()


def test_two_open_files_exclude_each_other(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with path.open("w") as one, path.open("r") as other:
        assert try_lock(one)
        assert try_lock(one), "its own lock does not block it"
        assert not try_lock(other)
        assert not try_lock(other.fileno())
        one.close()
        assert try_lock(other.fileno())


def test_lock_waits_for_the_holder(tmp_path: Path) -> None:
    path, order = tmp_path / "lock", []
    with path.open("w") as other:

        def wait() -> None:
            lock(other)
            order.append("second")

        with path.open("w") as one:
            lock(one)
            waiting = threading.Thread(target=wait)
            waiting.start()
            waiting.join(0.2)
            assert waiting.is_alive()
            order.append("first")
        waiting.join(DEADLINE_S)
    assert order == ["first", "second"]


@pytest.mark.parametrize("end", ["leaves", "is killed"])
def test_processes_exclude_each_other_until_one_is_gone(tmp_path: Path, end: str) -> None:
    path = tmp_path / "lock"
    with held_elsewhere(path) as process:
        with (
            pytest.raises(TimeoutError, match=rf"^{path} has been held by another process for more than 0\.2 s$"),
            exclusive(path, 0.2),
        ):
            pytest.fail("the lock was held")
        if end == "leaves":
            process.communicate("\n", DEADLINE_S)
        else:
            process.kill()
            process.wait(DEADLINE_S)
        with exclusive(path, DEADLINE_S):
            pass
    assert path.exists()


@pytest.mark.parametrize("patience_s", [DEADLINE_S, float("inf")], ids=["patient", "unlimited"])
def test_a_waiting_process_gets_the_lock_once_it_is_released(
    tmp_path: Path, patience_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, entered = tmp_path / "lock", threading.Event()
    monkeypatch.setattr(locks, "PAUSE_S", 0.01)

    def enter() -> None:
        with exclusive(path, patience_s):
            entered.set()

    with held_elsewhere(path) as process:
        waiting = threading.Thread(target=enter)
        waiting.start()
        assert not entered.wait(0.2)
        process.communicate("\n", DEADLINE_S)
        waiting.join(DEADLINE_S)
    assert entered.is_set()


def test_an_error_inside_releases_the_lock(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with pytest.raises(KeyError), exclusive(path):
        raise KeyError
    with exclusive(path, 0):
        pass


def test_child_processes_do_not_inherit_the_lock(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with exclusive(path):
        child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    with exclusive(path, 0):
        pass
    child.communicate(b"\n", DEADLINE_S)
    assert os.listdir(tmp_path) == ["lock"]


def test_a_lock_is_neither_followed_nor_emptied(tmp_path: Path) -> None:
    """A stranger's run may have a link there, whose target must keep its content."""
    outside, path = tmp_path / "outside", tmp_path / "lock"
    outside.write_text("mine")
    path.symlink_to(outside)
    with pytest.raises(OSError, match="it is a link, and links are not written through; remove it"), exclusive(path):
        pytest.fail("the link was followed")
    assert outside.read_text() == "mine"
    with exclusive(outside):
        pass
    assert outside.read_text() == "mine"
