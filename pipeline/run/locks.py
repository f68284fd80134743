"""Locks between processes of one machine, on files (flock).

A lock belongs to an open file: a process that closes the file or dies gives it up. Whether the file exists, and what is
in it, says nothing about the lock.
"""

from __future__ import annotations

import fcntl
import math
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

PAUSE_S = 0.1
"""Between two attempts where patience is limited."""


def lock(file: int | IO[Any]) -> None:
    """Lock an open file, once no other open file has it locked."""
    fcntl.flock(file, fcntl.LOCK_EX)


def try_lock(file: int | IO[Any]) -> bool:
    """Lock an open file, unless another open file has it locked; returns whether it is ours."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextmanager
def exclusive(path: Path, patience_s: float = math.inf) -> Iterator[None]:
    """Serialise what processes do with something, by a lock on the file `path` beside it.

    Errors: TimeoutError when another has held it for `patience_s`.
    """
    end, pause = time.monotonic() + patience_s, threading.Event()
    with path.open("w") as stream:
        if patience_s == math.inf:
            lock(stream)
        else:
            while not try_lock(stream):
                if time.monotonic() > end:
                    raise TimeoutError(f"{path} is held by another process for more than {patience_s:g} s")
                pause.wait(PAUSE_S)
        yield
