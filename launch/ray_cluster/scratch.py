"""Temporary folders of clusters: private, short enough for Ray's sockets, and removed even if all were killed.

A cluster's guard removes its folder when the cluster is over. Where the guard was killed too, as SLURM may do, the next
start on that machine does: a folder whose lock nobody holds is nobody's.
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
"""Characters of a path up to which Ray's sockets stay within the 107 that Linux allows."""
RAY = "ray"
"""The part of a folder that is Ray's own, which lets everybody read and write the folder that it is given. Inside one
that nobody else can enter that does no harm."""
PREFIX = "hydra-"
LOCK = "lock"
YOUNG_S = 60.0
"""A folder without a lock may still be in the making for so long."""


def new_scratch() -> tuple[Path, int]:
    """A new folder that only this user can enter, and the descriptor of the locked file that keeps it.

    It is below TMPDIR if that is short enough, and below /tmp otherwise. What killed ones of this user left is removed.
    """
    parent = Path(tempfile.gettempdir())
    if len(str(parent / PREFIX)) + 8 > LONGEST:
        parent = Path("/tmp")
    for left in parent.glob(f"{PREFIX}*"):
        with suppress(OSError):  # somebody else's, or just being removed
            if left.stat().st_uid == os.getuid() and not _is_held(left):
                shutil.rmtree(left, ignore_errors=True)
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
