"""The ids of the wandb run that a folder continues, stored in `folder`/wandb next to wandb's own files.

One rule: a new id whenever wandb may have rows that differ from the file's, since wandb can neither drop nor replace a
row. That is the case after a rollback truncates the file, and after a change of settings that determine the numbering
of rows; the caller then forgets the run. The server's rows are unknown offline, so that online and offline are two
runs, each with all rows.
"""

from __future__ import annotations

import re
import uuid
from pathlib import Path

from pipeline.run.files import atomic_write_text, make_folder, read_whole, touch

ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
"""An id; anything else in its file is damage, and a new one is made."""


def artifact_of(run: Path, stage: str) -> str:
    """Name of the wandb artifact of a stage's network."""
    return f"{run.name}-{stage.replace('/', '-')}"


def forget_run(folder: Path, rows: str | None = None) -> None:
    """Make the next start in `folder` a new wandb run, unless the last one was started with these `rows`.

    Must be called before the file of rows changes, even while wandb is disabled. Errors: OSError.
    """
    path = _path(folder)
    if path.is_file() and (rows is None or _lines(path)[1:] != [rows]):
        path.unlink()


def run_id_of(folder: Path, rows: str) -> str:
    """The id of a folder, created on first use. `rows` describes how rows are numbered. Errors: OSError."""
    path = _path(folder)
    make_folder(path.parent)
    if not path.exists() or not ID.fullmatch(_lines(path)[0]):
        atomic_write_text(path, f"{uuid.uuid4().hex[:16]}\n{rows}\n")
    return _lines(path)[0]


def offline_id_of(folder: Path, run_id: str) -> str:
    """The id of the offline run of a folder, valid until `mark_synced`. Errors: OSError."""
    path = _offline_path(folder)
    offline_id = _lines(path)[0] if path.exists() else ""
    if not offline_id.startswith(f"{run_id}-") or not ID.fullmatch(offline_id):
        offline_id = f"{run_id}-{uuid.uuid4().hex[:8]}"
        atomic_write_text(path, offline_id + "\n")
    return offline_id


def mark_synced(folder: Path, run_id: str) -> None:
    """Once the server has all rows: `wandb sync` skips the offline files, and a later offline run starts at row 0."""
    _offline_path(folder).unlink(missing_ok=True)
    for path in (folder / "wandb").glob(f"offline-run-*-{run_id}-*/run-*.wandb"):
        if not path.parent.is_symlink():
            touch(path.with_name(f"{path.name}.synced"))


def _lines(path: Path) -> list[str]:
    """The lines of a file of ids, at least one. Errors: OSError or ValueError if it cannot be read."""
    return read_whole(path).decode("utf-8", errors="replace").splitlines() or [""]


def _path(folder: Path) -> Path:
    return folder / "wandb" / "run_id"


def _offline_path(folder: Path) -> Path:
    return folder / "wandb" / "offline_id"
