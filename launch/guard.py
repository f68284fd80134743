"""Ends a Ray cluster's processes when the process that answers for them is gone, however it ended.

Every process of a cluster carries a mark in its environment, which orphans keep. The guard is a small process in a
session of its own that waits for the end of a pipe: when its owner closes it or dies, SIGKILL included, it ends all
that carry the mark and deletes the cluster's temporary folder. Nothing else of this machine is touched.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

MARK = "HYDRA_CLUSTER"
END_S = 20.0
POLL_S = 0.1


def marked(mark: str) -> list[int]:
    """Living processes that were started with the mark, this one left out."""
    wanted = f"{MARK}={mark}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            environment = (entry / "environ").read_bytes()
        except OSError:  # it has ended, or is another user's
            continue
        if wanted in environment.split(b"\0"):
            found.append(int(entry.name))
    return found


def end_marked(mark: str, deadline_s: float = END_S) -> list[int]:
    """SIGKILL all that carry the mark, again until none is left (they may be starting others). Returns who stays."""
    end, pause = time.monotonic() + deadline_s, threading.Event()
    while left := marked(mark):
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if time.monotonic() > end:
            break
        pause.wait(POLL_S)
    return left


class Guard:
    """A mark for the processes of one cluster, its private temporary folder, and the process that ends both."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.mark = secrets.token_hex(8)
        root = str(Path(__file__).resolve().parent.parent)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "launch.guard", self.mark, str(folder)],
            cwd=root,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )

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
    """Wait for the end of standard input, then clean up."""
    ignore_job_signals()
    sys.stdin.buffer.read()
    left = end_marked(mark)
    shutil.rmtree(folder, ignore_errors=True)
    return 1 if left else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
