"""The ids of the wandb run that a folder continues, stored in `folder`/wandb next to wandb's own files.

One rule: a new id whenever wandb may have rows that differ from the file's, since wandb can neither drop nor replace a
row. That is the case after a rollback truncates the file, and after a change of settings that determine the numbering
of rows; the caller then forgets the run. The server's rows are unknown offline, so that online and offline are two
runs, each with all rows.
"""

from __future__ import annotations

import uuid
from pathlib import Path

from pipeline.run.files import atomic_write_text, make_folder, touch


def forget_run(folder: Path, rows: str | None = None) -> None:
    """Make the next start in `folder` a new wandb run, unless the last one was started with these `rows`.

    Must be called before the file of rows changes, even while wandb is disabled. Errors: OSError.
    """
    path = _path(folder)
    if path.is_file() and (rows is None or path.read_text(encoding="utf-8").splitlines()[1:] != [rows]):
        path.unlink()


def run_id_of(folder: Path, rows: str) -> str:
    """The id of a folder, created on first use. `rows` describes how rows are numbered. Errors: OSError."""
    path = _path(folder)
    make_folder(path.parent)
    if not path.exists():
        atomic_write_text(path, f"{uuid.uuid4().hex[:16]}\n{rows}\n")
    return path.read_text(encoding="utf-8").splitlines()[0]


def offline_id_of(folder: Path, run_id: str) -> str:
    """The id of the offline run of a folder, valid until `mark_synced`. Errors: OSError."""
    path = _offline_path(folder)
    offline_id = path.read_text(encoding="utf-8").strip() if path.exists() else ""
    if not offline_id.startswith(f"{run_id}-"):
        offline_id = f"{run_id}-{uuid.uuid4().hex[:8]}"
        atomic_write_text(path, offline_id + "\n")
    return offline_id


def mark_synced(folder: Path, run_id: str) -> None:
    """Once the server has all rows: `wandb sync` skips the offline files, and a later offline run starts at row 0."""
    _offline_path(folder).unlink(missing_ok=True)
    for path in (folder / "wandb").glob(f"offline-run-*-{run_id}-*/run-*.wandb"):
        if not path.parent.is_symlink():
            touch(path.with_name(f"{path.name}.synced"))


def _path(folder: Path) -> Path:
    return folder / "wandb" / "run_id"


def _offline_path(folder: Path) -> Path:
    return folder / "wandb" / "offline_id"
