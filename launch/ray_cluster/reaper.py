"""Ends the processes of a Ray cluster when their owner is gone, however it ended.

Every process of a cluster, and so every descendant, inherits a mark in its environment, which orphans keep. Some
processes overwrite their environment with their title, so the reaper also tracks parents and children. It is a small
process in a session of its own that waits for the end of a pipe: when the owner closes it or dies, even by SIGKILL, the
reaper kills the marked processes and deletes the cluster's temporary folder. No other process is touched.
"""

from __future__ import annotations

import os
import secrets
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

from launch.ray_cluster.scratch import RAY, new_scratch

CLUSTER_MARK = "HYDRA_CLUSTER"
END_S = 20.0
POLL_S = 0.1
SCAN_S = 1.0
"""Interval at which the reaper scans for new processes."""
YOUNG_S = 10.0
"""For this long after its start a process may still exec another program, with another environment."""

Process = tuple[int, int]
"""(pid, start time in clock ticks): unique even if the pid is reused."""


def _uptime_s() -> float:
    """Seconds since boot, the origin of start times."""
    return float(Path("/proc/uptime").read_text().split()[0])


class ProcessTree:
    """The processes of one mark: those that carry it, and their descendants."""

    def __init__(self, mark: str) -> None:
        self._marker = f"{CLUSTER_MARK}={mark}".encode()
        self._seen: set[Process] = set()
        self._ours: set[Process] = set()

    def scan(self) -> list[int]:
        """Add new processes; returns the pids of all that are alive, without this process."""
        alive, parents = set[Process](), dict[Process, int]()
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != os.getpid():
                try:
                    fields = (entry / "stat").read_text().rpartition(")")[2].split()
                except OSError:  # it has just ended
                    continue
                process = int(entry.name), int(fields[19])
                if fields[0] not in "ZX":
                    alive.add(process)
                    parents[process] = int(fields[1])
        self._ours &= alive
        pids = {pid for pid, _ in self._ours}
        # By start time, so that a parent comes before its children. A process is checked again until it is not young.
        for process in sorted(alive - self._seen, key=lambda one: (one[1], one[0])):
            if parents[process] in pids or self._has_mark(process[0]):
                self._ours.add(process)
                pids.add(process[0])
        young_since = (_uptime_s() - YOUNG_S) * os.sysconf("SC_CLK_TCK")
        self._seen = {process for process in alive if process[1] < young_since}
        return sorted(pids)

    def _has_mark(self, pid: int) -> bool:
        try:
            return self._marker in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        except OSError:  # it has ended, or is another user's
            return False

    def end(self, deadline_s: float = END_S) -> list[int]:
        """SIGKILL all of them, repeatedly, as they may be starting others. Returns the pids that are left."""
        end, pause = time.monotonic() + deadline_s, threading.Event()
        while left := self.scan():
            for pid in left:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            if time.monotonic() > end:
                break
            pause.wait(POLL_S)
        return left


class Reaper:
    """The mark of one cluster's processes, its private temporary folder, and the process that removes both."""

    def __init__(self) -> None:
        self.folder, lock = new_scratch()
        self.ray_folder = self.folder / RAY
        self.mark = secrets.token_hex(8)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "launch.ray_cluster.reaper", self.mark, str(self.folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
            pass_fds=[lock],
        )
        os.close(lock)  # only the reaper process holds the lock now, until it ends

    def close(self) -> None:
        """End every process with the mark, and wait for that. Idempotent."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(END_S + 10)


def ignore_job_signals() -> None:
    """For child processes: SLURM may send its warnings to every process of a job, but only the leader handles them."""
    for number in (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def main(mark: str, folder: str) -> int:
    """Watch until the end of standard input, then clean up."""
    ignore_job_signals()
    processes = ProcessTree(mark)
    while not select.select([sys.stdin], [], [], SCAN_S)[0]:
        processes.scan()
    left = processes.end()
    shutil.rmtree(folder, ignore_errors=True)
    return 1 if left else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
