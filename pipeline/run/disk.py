"""Free disk space, and retries for transient file system errors."""

from __future__ import annotations

import errno
import logging
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

log = logging.getLogger(__name__)

FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
TRANSIENT = frozenset(
    {
        errno.EIO,
        errno.ESTALE,
        errno.ETIMEDOUT,
        errno.EAGAIN,
        errno.EINTR,
        errno.ENETDOWN,
        errno.ENETUNREACH,
        errno.ENETRESET,
        errno.ECONNRESET,
        errno.ECONNABORTED,
        errno.EHOSTDOWN,
        errno.EHOSTUNREACH,
        errno.ENOTCONN,
    }
)
"""Errors that a network file system reports while its server is briefly unreachable."""
PAUSES_S = (1.0, 3.0, 8.0, 20.0)
"""Pauses between attempts; their sum is well below the timeout after which a worker counts as hung."""

Result = TypeVar("Result")
Pause = Callable[[float], object]


class DiskFull(OSError):
    """There is too little space for a file; nothing was written."""


def readable(count: float) -> str:
    """12345678 -> '12.3 MB'."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def free_bytes(folder: Path) -> int | None:
    """Bytes that this user may still write at `folder`, which need not exist; None if unknown.

    Quotas are not included: exceeding one raises EDQUOT.
    """
    while not folder.exists():
        folder = folder.parent
    usage = shutil.disk_usage(folder)
    return usage.free if usage.total > 0 else None


def retried(action: Callable[[int], Result], what: str, pause: Pause | None = None) -> Result:
    """action(attempt), with attempt counting from 0, retried after each pause of PAUSES_S on transient errors.

    Errors: that of the last attempt; one that is not transient, such as a full disk's, at once.
    """
    pause = pause or threading.Event().wait
    for attempt, pause_s in enumerate(PAUSES_S):
        try:
            return action(attempt)
        except OSError as error:
            if error.errno not in TRANSIENT:
                raise
            log.warning("%s failed; retrying in %g s: %s", what, pause_s, error)
            pause(pause_s)
    return action(len(PAUSES_S))
