"""What a command prints of an error, and its exit code: 0 done, 1 failed, 2 wrong usage, recipe, data or path."""

from __future__ import annotations

import errno
import logging
import os
import sys
from collections.abc import Callable
from types import FrameType

from pipeline.run.printable import printable

USER_ERRORS = frozenset(
    {
        *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST),
        *(errno.ELOOP, errno.EINVAL, errno.ENXIO, errno.ENAMETOOLONG, errno.EFBIG),
    }
)
"""Errors of a path that cannot be used: wrong permissions, or something else lies there."""


class _PrintableFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def show_warnings() -> None:
    """Print warnings of this process on standard error."""
    handler = logging.StreamHandler()
    handler.setFormatter(_PrintableFormatter("%(levelname)s: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])


def print_error(error: object) -> None:
    print(printable(f"error: {error}"), file=sys.stderr)


def raise_interrupt(number: int, frame: FrameType | None) -> None:
    """Handler of signals that end a command as Ctrl-C does."""
    raise KeyboardInterrupt


def exit_code_of(command: Callable[[], int]) -> int:
    """Call a command; its exit code, or that of its error, which is printed in one line."""
    try:
        return command()
    except ValueError as error:
        print_error(error)
        return 2
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that the flush at exit does not fail too
        return 1
    except OSError as error:
        print_error(_reason(error))
        return 2 if error.errno in USER_ERRORS else 1


def _reason(error: OSError) -> str:
    if error.filename is None:
        return f"{type(error).__name__}: {error}"
    fix = "; check its permissions, or name another path" if error.errno in USER_ERRORS else ""
    return f"{os.fsdecode(error.filename)}: {error.strerror}{fix}"
