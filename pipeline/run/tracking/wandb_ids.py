"""Which wandb run a folder goes on with. Its ids lie in `folder`/wandb, beside wandb's own files.

One rule: a new id wherever what wandb has may be other rows than those of the file, as wandb can neither drop nor
replace a row. That is so after the file was cut to go on in another way, and after a change of what decides which row
has which number: the caller forgets the run. And offline nobody knows what the server has, so that online and offline
are two runs, each with all rows.
"""

from __future__ import annotations

import uuid
from pathlib import Path

from pipeline.run.files import atomic_write_text


def forget_run(folder: Path, rows: str | None = None) -> None:
    """The next start in `folder` is another wandb run, unless the last one was started for these `rows`.

    Comes before the file of the rows is changed, and whether there is a mirror now or not. Errors: OSError.
    """
    path = _path(folder)
    if path.is_file() and (rows is None or path.read_text(encoding="utf-8").splitlines()[1:] != [rows]):
        path.unlink()


def kept_run(folder: Path, rows: str) -> str:
    """The id of a folder, made once and kept. `rows` says what decides which row has which number. Errors: OSError."""
    path = _path(folder)
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        atomic_write_text(path, f"{uuid.uuid4().hex[:16]}\n{rows}\n")
    return path.read_text(encoding="utf-8").splitlines()[0]


def offline_run(folder: Path, run_id: str) -> str:
    """The id of what is recorded offline, until `settle_offline`. Errors: OSError."""
    path = _offline_path(folder)
    kept = path.read_text(encoding="utf-8").strip() if path.exists() else ""
    if not kept.startswith(f"{run_id}-"):
        kept = f"{run_id}-{uuid.uuid4().hex[:8]}"
        atomic_write_text(path, kept + "\n")
    return kept


def settle_offline(folder: Path, run_id: str) -> None:
    """The server has all rows: `wandb sync` passes over what was recorded offline, and what will be begins at row 0."""
    _offline_path(folder).unlink(missing_ok=True)
    for path in (folder / "wandb").glob(f"offline-run-*-{run_id}-*/run-*.wandb"):
        path.with_name(f"{path.name}.synced").touch()


def _path(folder: Path) -> Path:
    return folder / "wandb" / "run_id"


def _offline_path(folder: Path) -> Path:
    return folder / "wandb" / "offline_id"
