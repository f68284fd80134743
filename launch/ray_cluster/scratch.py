"""Temporary folders of clusters: private, with paths short enough for Ray's sockets, and always removed.

A cluster's reaper removes its folder. If the reaper was killed too, as SLURM may do, the next start on that machine
does: a folder with our marker has no owner once the marker's lock is free. Folders without a marker are somebody
else's, whatever their name.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
import tempfile
from contextlib import suppress
from pathlib import Path

from pipeline.run.locks import lock, try_lock

LONGEST = 38
"""Longest path, in characters, with which Ray's socket paths stay within Linux's limit of 107."""
RAY = "ray"
"""Subfolder for Ray, which makes its folder world-writable. That is harmless inside a folder that only this user can
enter."""
PREFIX = "hydra-"
MARKER = ".hydra-pipeline-scratch"
"""The file that makes a folder ours to delete, locked while the cluster lives."""


def new_scratch() -> tuple[Path, int]:
    """A new folder that only this user can enter, and the descriptor of its marker file, which is locked.

    It is in TMPDIR if that path is short enough and has no spaces, else in /tmp. Abandoned folders of this user are
    removed.
    """
    parent = Path(tempfile.gettempdir())
    if len(str(parent / PREFIX)) + 8 > LONGEST or re.search(r"\s", str(parent)):
        parent = Path("/tmp")
    for folder in parent.glob(f"{PREFIX}*"):
        with suppress(OSError):  # another user's, not a cluster's, or removed at this moment
            if _is_abandoned(folder):
                shutil.rmtree(folder, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
    (folder / RAY).mkdir()
    unlocked = folder / f"{MARKER}.new"
    descriptor = os.open(unlocked, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    lock(descriptor)
    os.rename(unlocked, folder / MARKER)  # so that no other start ever sees the marker without its lock
    return folder, descriptor


def _is_abandoned(folder: Path) -> bool:
    """Whether a folder is a cluster's of this user whose owner is gone. Errors: OSError, also without a marker."""
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
        return False
    descriptor = os.open(folder / MARKER, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        marker = os.fstat(descriptor)
        return stat.S_ISREG(marker.st_mode) and marker.st_uid == os.getuid() and try_lock(descriptor)
    finally:
        os.close(descriptor)
