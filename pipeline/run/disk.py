"""Room on a disk before it is needed, and file system errors that pass by themselves."""

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
"""What a network file system says while its server is away for a moment."""
PAUSES_S = (1.0, 3.0, 8.0, 20.0)
"""Between the attempts; together well below the deadlines after which a worker is taken for hung."""

Result = TypeVar("Result")
Pause = Callable[[float], object]


class DiskFull(OSError):
    """There is too little room for what is to be written; nothing was written."""


def readable(count: float) -> str:
    """12345678 -> '12.3 MB'."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def free_bytes(folder: Path) -> int | None:
    """Bytes that this user may still write where `folder` is or will be; None where the file system does not tell.

    A quota is not seen here: it shows when it is exceeded, as EDQUOT.
    """
    while not folder.exists():
        folder = folder.parent
    usage = shutil.disk_usage(folder)
    return usage.free if usage.total > 0 else None


def retried(action: Callable[[int], Result], what: str, pause: Pause | None = None) -> Result:
    """action(attempt), attempt counting from 0, tried again after every pause of PAUSES_S while its error may pass.

    Errors: the last one; any that will not pass, such as that of a full disk, at once.
    """
    pause = pause or threading.Event().wait
    for attempt, pause_s in enumerate(PAUSES_S):
        try:
            return action(attempt)
        except OSError as error:
            if error.errno not in TRANSIENT:
                raise
            log.warning("%s failed and is tried again in %g s: %s", what, pause_s, error)
            pause(pause_s)
    return action(len(PAUSES_S))
