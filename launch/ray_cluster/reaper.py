"""Ends a Ray cluster's processes when the process that answers for them is gone, however it ended.

Every process of a cluster carries a mark in its environment, which orphans keep, and so do its descendants; some of
them write their title over their environment, so the guard also remembers who was whose child. It is a small process in
a session of its own that waits for the end of a pipe: when its owner closes it or dies, SIGKILL included, it ends them
all and deletes the cluster's temporary folder. Nothing else of this machine is touched.
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
LOOK_S = 1.0
"""How often the guard looks who is new."""
YOUNG_S = 10.0
"""A process may still be about to become another program, with another environment, for so long."""


Process = tuple[int, int]
"""pid and start time in clock ticks, which tells a pid from its later reuse."""


def _uptime_s() -> float:
    """Seconds since the boot that start times count from."""
    return float(Path("/proc/uptime").read_text().split()[0])


class ProcessTree:
    """The processes of one mark: those that carry it, and their descendants."""

    def __init__(self, mark: str) -> None:
        self._wanted = f"{CLUSTER_MARK}={mark}".encode()
        self._seen: set[Process] = set()
        self._ours: set[Process] = set()

    def look(self) -> list[int]:
        """Take in who is new; returns the pids of all that live, this process left out."""
        living, parents = set[Process](), dict[Process, int]()
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != os.getpid():
                try:
                    fields = (entry / "stat").read_text().rpartition(")")[2].split()
                except OSError:  # it has just ended
                    continue
                process = int(entry.name), int(fields[19])
                if fields[0] not in "ZX":
                    living.add(process)
                    parents[process] = int(fields[1])
        self._ours &= living
        pids = {pid for pid, _ in self._ours}
        # By start time: a parent is judged before its children. Environments are read until a process is not young.
        for process in sorted(living - self._seen, key=lambda one: (one[1], one[0])):
            if parents[process] in pids or self._carries(process[0]):
                self._ours.add(process)
                pids.add(process[0])
        grown = (_uptime_s() - YOUNG_S) * os.sysconf("SC_CLK_TCK")
        self._seen = {process for process in living if process[1] < grown}
        return sorted(pids)

    def _carries(self, pid: int) -> bool:
        try:
            return self._wanted in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        except OSError:  # it has ended, or is another user's
            return False

    def end(self, deadline_s: float = END_S) -> list[int]:
        """SIGKILL all of them, again until none is left (they may be starting others). Returns who stays."""
        end, pause = time.monotonic() + deadline_s, threading.Event()
        while left := self.look():
            for pid in left:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            if time.monotonic() > end:
                break
            pause.wait(POLL_S)
        return left


class Reaper:
    """A mark for the processes of one cluster, its private temporary folder, and the process that ends both."""

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
        os.close(lock)  # now the guard's alone: the folder is held for as long as it lives

    def close(self) -> None:
        """End everything that carries the mark, and return when it has ended. Closing twice is fine."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(END_S + 10)


def ignore_job_signals() -> None:
    """For children of a job's process: SLURM may send its warnings to all of a job, and they are not for them."""
    for number in (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def main(mark: str, folder: str) -> int:
    """Watch until the end of standard input, then clean up."""
    ignore_job_signals()
    family = ProcessTree(mark)
    while not select.select([sys.stdin], [], [], LOOK_S)[0]:
        family.look()
    left = family.end()
    shutil.rmtree(folder, ignore_errors=True)
    return 1 if left else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
