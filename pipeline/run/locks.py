"""Locks between processes of one machine, on files (flock).

A lock belongs to an open file and is released when the process closes the file or dies. The file's existence and
content say nothing about the lock.
"""

from __future__ import annotations

import fcntl
import math
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from pipeline.run.files import open_own

PAUSE_S = 0.1
"""Pause between attempts where `patience_s` is finite."""


def lock(file: int | IO[Any]) -> None:
    """Lock an open file, waiting until no other open file holds the lock."""
    fcntl.flock(file, fcntl.LOCK_EX)


def try_lock(file: int | IO[Any]) -> bool:
    """Lock an open file unless another open file holds the lock; returns whether it was acquired."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextmanager
def exclusive(path: Path, patience_s: float = math.inf) -> Iterator[None]:
    """Hold the lock on the file `path`, which is created next to what it protects, and whose content is not touched.

    Errors: TimeoutError if it could not be acquired within `patience_s`; OSError, also if `path` is a link.
    """
    end, pause = time.monotonic() + patience_s, threading.Event()
    with os.fdopen(open_own(path, os.O_RDWR), "r+b", buffering=0) as stream:
        if patience_s == math.inf:
            lock(stream)
        else:
            while not try_lock(stream):
                if time.monotonic() > end:
                    raise TimeoutError(f"{path} has been held by another process for more than {patience_s:g} s")
                pause.wait(PAUSE_S)
        yield
