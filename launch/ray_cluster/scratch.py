"""Temporary folders of clusters: private, with paths short enough for Ray's sockets, and always removed.

A cluster's reaper removes its folder. If the reaper was killed too, as SLURM may do, the next start on that machine
does: a folder whose lock is free has no owner.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from pipeline.run.locks import lock, try_lock

LONGEST = 38
"""Longest path, in characters, with which Ray's socket paths stay within Linux's limit of 107."""
RAY = "ray"
"""Subfolder for Ray, which makes its folder world-writable. That is harmless inside a folder that only this user can
enter."""
PREFIX = "hydra-"
LOCK = "lock"
YOUNG_S = 60.0
"""For this long, a folder without a lock may still be under creation."""


def new_scratch() -> tuple[Path, int]:
    """A new folder that only this user can enter, and the descriptor of its lock file, which is locked.

    It is in TMPDIR if that path is short enough, else in /tmp. Abandoned folders of this user are removed.
    """
    parent = Path(tempfile.gettempdir())
    if len(str(parent / PREFIX)) + 8 > LONGEST:
        parent = Path("/tmp")
    for folder in parent.glob(f"{PREFIX}*"):
        with suppress(OSError):  # another user's, or removed at this moment
            if folder.stat().st_uid == os.getuid() and not _is_held(folder):
                shutil.rmtree(folder, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
    descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    lock(descriptor)
    (folder / RAY).mkdir()
    return folder, descriptor


def _is_held(folder: Path) -> bool:
    try:
        descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return time.time() - folder.stat().st_mtime < YOUNG_S
    try:
        return not try_lock(descriptor)
    finally:
        os.close(descriptor)
