"""The one way to write a run's files, and strict reading of small ones.

Somebody else may have made the run directory. Files are therefore replaced by rename, appended to without following
links, and folders below a run are refused if they are links: nothing outside the run is changed.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from pipeline.regular_file import check_regular, open_regular, read_regular
from pipeline.run.disk import TRANSIENT

PRIVATE = 0o600
"""Permissions of a file that may hold a key."""
LARGEST_BYTES = 1 << 28
"""Of a JSON file; the manifest of ImageNet has 8 MB."""
DEEPEST = 64
"""Levels of nesting in a JSON value."""
LONGEST_INTEGER = 20
"""Digits of an integer in JSON: those of 2^64."""


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Add the file name to an OSError: those of write and fsync carry an error number only."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def fsync_folder(folder: Path) -> None:
    """Make renames inside `folder` survive a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with naming(folder):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def settle_file(path: Path) -> None:
    """Flush a file that a library wrote, and give it its folder's permissions: safetensors creates private files."""
    path.chmod(path.parent.stat().st_mode & 0o666)
    with path.open("rb") as stream, naming(path):
        os.fsync(stream.fileno())


def make_folder(path: Path, mode: int = 0o777) -> None:
    """Make a folder of a run, and the folders above it.

    Errors: ValueError if it, or a folder between it and the run directory, is a link.
    """
    run = next((folder for folder in path.parents if (folder / "recipe.yaml").exists()), path.parent)
    for folder in (path, *path.parents[: len(path.parts) - len(run.parts) - 1]):
        if folder.is_symlink():
            raise ValueError(f"{folder} is a link, and what is written there would leave the run; remove the link")
    path.mkdir(mode, parents=True, exist_ok=True)


def open_own(path: Path, flags: int, mode: int = 0o666) -> int:
    """Open or create a file of a run for writing, without waiting, and without following a link in its last part.

    Errors: OSError naming what is in the way.
    """
    try:
        descriptor = os.open(path, flags | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, mode)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise OSError(
                errno.ELOOP, "it is a link, and links are not written through; remove it", str(path)
            ) from None
        raise
    try:
        check_regular(descriptor, path)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def open_to_append(path: Path) -> IO[str]:
    """Open or create a log or a file of rows. Errors: those of `open_own`."""
    return os.fdopen(open_own(path, os.O_WRONLY | os.O_APPEND), "a", encoding="utf-8")


def touch(path: Path) -> None:
    """Create an empty file whose existence is a message. Errors: those of `open_own`."""
    os.close(open_own(path, os.O_WRONLY))


@contextmanager
def replacing(path: Path, mode: int = 0o666) -> Iterator[Path]:
    """A temporary file next to `path`, to write to in any way; flushed to disk and renamed over `path` on success."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.unlink(missing_ok=True)  # of a process that was killed, or a link to elsewhere
        os.close(open_own(temporary, os.O_WRONLY | os.O_EXCL, mode))
        with naming(path):
            yield temporary
            with temporary.open("rb") as stream:
                os.fsync(stream.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)


def atomic_write_text(path: Path, text: str, mode: int = 0o644) -> None:
    """Write `text` to a temporary file next to `path`, flush it to disk, rename it over `path`."""
    with replacing(path, mode) as temporary:
        temporary.write_text(text, encoding="utf-8")


def atomic_write_json(path: Path, value: Any, mode: int = 0o644) -> None:
    """Errors: ValueError for NaN or infinity, which JSON lacks."""
    atomic_write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n", mode)


def read_whole(path: Path, most: int | None = None) -> bytes:
    """The content of a regular file of at most `most` bytes.

    Errors: ValueError naming the file if it is missing or cannot be read; OSError if the error is transient.
    """
    try:
        return read_regular(path, most)
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist") from None
    except OSError as error:
        if error.errno in TRANSIENT:
            raise
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from None


def read_json(path: Path) -> Any:
    """Parse a JSON file. Errors: those of `read_whole`; ValueError naming the file if it is damaged."""
    data = read_whole(path, LARGEST_BYTES)
    try:
        return parse_json(data)
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: {error}") from None


def parse_json(text: str | bytes) -> Any:
    """A JSON value, with numbers and a depth that every later step can handle. Errors: ValueError."""
    text = text if isinstance(text, str) else text.decode("utf-8")
    try:
        value = json.loads(text, parse_int=_parse_int, parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError(f"it is nested more than {DEEPEST} levels deep") from None
    level = [value]
    for _ in range(DEEPEST):
        level = [inner for one in level for inner in _inside(one)]
    if level:
        raise ValueError(f"it is nested more than {DEEPEST} levels deep")
    return value


def _inside(value: Any) -> list[Any]:
    return list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []


def _parse_int(digits: str) -> int:
    if len(digits.lstrip("-")) > LONGEST_INTEGER:
        raise ValueError(f"it has a number of {len(digits)} digits")
    return int(digits)


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"it has the number {name}, which JSON lacks")


def parse_row(line: bytes) -> dict[str, Any] | None:
    """One line of a JSON-lines file; None if it is torn (no newline yet) or not an object."""
    if not line.endswith(b"\n"):
        return None
    try:
        row = parse_json(line)
    except ValueError:  # includes invalid UTF-8
        return None
    return row if isinstance(row, dict) else None


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON-lines file, in order; damaged lines are skipped, and a missing file has no rows.

    Errors: ValueError if it is not a regular file or may not be read; OSError if the error is transient.
    """
    lines = read_whole(path).split(b"\n") if path.exists() else []
    lines = [line + b"\n" for line in lines[:-1]]  # the last one has no newline, so it is torn, or empty
    return [row for line in lines if (row := parse_row(line)) is not None]


def sha256_of(path: Path) -> str:
    """Errors: OSError, also for a FIFO or a device."""
    with open_regular(path) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
