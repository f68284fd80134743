"""The reaper ends what carries its mark, and only that, however its owner ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from launch.ray_cluster.reaper import CLUSTER_MARK, ProcessTree, Reaper
from tests.support.commands import ROOT, wait_until

SLEEP = [sys.executable, "-c", "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); signal.pause()"]


@pytest.fixture
def bystander() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(SLEEP, env={**os.environ, CLUSTER_MARK: "another"})
    yield process
    process.kill()
    process.wait()


def gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_a_process_that_is_seen_before_it_becomes_ours_is_ours() -> None:
    """As between fork and exec, when it still has its parent's environment."""
    environment = f"{{**os.environ, {CLUSTER_MARK!r}: 'young'}}"
    become = f"import os, sys; sys.stdin.read(1); os.execve({SLEEP[0]!r}, {SLEEP!r}, {environment})"
    with subprocess.Popen([sys.executable, "-c", become], stdin=subprocess.PIPE) as process:
        assert process.stdin is not None
        try:
            processes = ProcessTree("young")
            assert processes.scan() == []
            process.stdin.write(b"x")
            process.stdin.close()
            wait_until(lambda: processes.scan() == [process.pid], 9, "the process to be noticed")
        finally:
            process.kill()


def test_closing_ends_the_marked_and_removes_the_folder(bystander: subprocess.Popen[bytes]) -> None:
    reaper = Reaper()
    stubborn = subprocess.Popen(SLEEP, env={**os.environ, CLUSTER_MARK: reaper.mark}, start_new_session=True)
    stopped = subprocess.Popen(SLEEP, env={**os.environ, CLUSTER_MARK: reaper.mark})
    stopped.send_signal(signal.SIGSTOP)
    wait_until(lambda: set(ProcessTree(reaper.mark).scan()) == {stubborn.pid, stopped.pid}, 20, "both are marked")
    reaper.close()
    assert (stubborn.wait(5), stopped.wait(5)) == (-signal.SIGKILL, -signal.SIGKILL)
    assert not reaper.folder.exists()
    assert bystander.poll() is None
    reaper.close()


def test_an_owner_that_is_killed_is_cleaned_up_after(tmp_path: Path, bystander: subprocess.Popen[bytes]) -> None:
    pid_file = tmp_path / "pid"
    owner = textwrap.dedent(f"""
        import os, signal, subprocess
        from pathlib import Path
        from launch.ray_cluster.reaper import CLUSTER_MARK, Reaper
        reaper = Reaper()
        child = subprocess.Popen({SLEEP!r}, env={{**os.environ, CLUSTER_MARK: reaper.mark}}, start_new_session=True)
        Path({str(pid_file)!r}).with_suffix(".tmp").write_text(f"{{child.pid}} {{reaper.folder}}")
        os.rename({str(pid_file)!r} + ".tmp", {str(pid_file)!r})
        signal.pause()
    """)
    process = subprocess.Popen([sys.executable, "-c", owner], cwd=ROOT)
    wait_until(pid_file.exists, 20, "the owner has started")
    pid, _, place = pid_file.read_text().partition(" ")
    child, folder = int(pid), Path(place)
    assert not gone(child)
    assert folder.exists()
    other = Reaper()  # a start beside it leaves the folder alone
    assert folder.exists()
    other.close()
    process.kill()
    process.wait()
    wait_until(lambda: gone(child) and not folder.exists(), 20, "the reaper has cleaned up")
    assert bystander.poll() is None


def test_a_child_that_hides_its_environment_is_remembered(tmp_path: Path) -> None:
    """As Ray's agents do, which overwrite it with their title; the parent has ended by then."""
    pid_file = tmp_path / "pid"
    parent = textwrap.dedent(f"""
        import os, subprocess, sys
        child = subprocess.Popen({SLEEP!r}, env={{}}, start_new_session=True)
        open({str(pid_file)!r} + ".tmp", "w").write(str(child.pid))
        os.rename({str(pid_file)!r} + ".tmp", {str(pid_file)!r})
        sys.stdin.read()
    """)
    processes = ProcessTree("hidden")
    process = subprocess.Popen(
        [sys.executable, "-c", parent], env={**os.environ, CLUSTER_MARK: "hidden"}, stdin=subprocess.PIPE
    )
    wait_until(pid_file.exists, 20, "the child has started")
    child = int(pid_file.read_text())
    assert set(processes.scan()) == {process.pid, child}
    process.communicate()
    assert processes.scan() == [child]
    assert processes.end() == []
    wait_until(lambda: gone(child), 5, "the child has ended")


def test_nothing_marked_is_nothing_to_do() -> None:
    assert ProcessTree("unused").end() == []
