"""Atomic writing and strict reading of small files."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.run.disk import TRANSIENT

PRIVATE = 0o600
"""Permissions of a file that may hold a key."""


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


def atomic_write_text(path: Path, text: str, mode: int = 0o644) -> None:
    """Write `text` to a temporary file next to `path`, flush it to disk, rename it over `path`."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
    try:
        with naming(path), os.fdopen(descriptor, "w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)


def atomic_write_json(path: Path, value: Any, mode: int = 0o644) -> None:
    atomic_write_text(path, json.dumps(value, indent=1) + "\n", mode)


def read_json_if_there(path: Path) -> Any | None:
    """`read_json`, or None if the file does not exist."""
    return read_json(path) if path.exists() else None


def read_json(path: Path) -> Any:
    """Parse a JSON file.

    Errors: ValueError naming the file if it is missing or damaged; OSError if the error is transient.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        if isinstance(error, OSError) and error.errno in TRANSIENT:
            raise
        raise ValueError(f"{path} cannot be read: {error}") from None


def parse_row(line: bytes) -> dict[str, Any] | None:
    """One line of a JSON-lines file; None if it is torn (no newline yet) or not an object."""
    if not line.endswith(b"\n"):
        return None
    try:
        row = json.loads(line)
    except ValueError:  # includes invalid UTF-8
        return None
    return row if isinstance(row, dict) else None


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON-lines file, in order; damaged lines are skipped, and a missing file has no rows."""
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    return [row for line in lines if (row := parse_row(line)) is not None]


def sha256_of(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
