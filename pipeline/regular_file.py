"""Opens regular files and nothing else: a FIFO waits for a writer without end, and a device has no end."""

from __future__ import annotations

import errno
import os
import stat
from io import BufferedReader
from pathlib import Path


class NotARegularFile(OSError):
    """A FIFO, a socket or a device lies where a file is expected."""


def check_regular(descriptor: int, path: str | Path) -> None:
    """Errors: IsADirectoryError or NotARegularFile unless an open file is a regular one."""
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, "it is a folder, not a file", str(path))
    if not stat.S_ISREG(mode):
        raise NotARegularFile(errno.EINVAL, "it is a FIFO, a socket or a device, not a file", str(path))


def open_regular(path: str | Path) -> BufferedReader:
    """Open a regular file for reading, without ever waiting. Errors: OSError, see `check_regular`."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        check_regular(descriptor, path)
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_regular(path: str | Path, most: int | None = None) -> bytes:
    """The content of a regular file. Errors: OSError, also for more than `most` bytes."""
    with open_regular(path) as stream:
        if most is not None and (size := os.fstat(stream.fileno()).st_size) > most:
            raise OSError(errno.EFBIG, f"it has {size:,} bytes, and at most {most:,} are read", str(path))
        return stream.read()
