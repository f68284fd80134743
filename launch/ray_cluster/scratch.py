"""Temporary folders of clusters: private, with paths short enough for Ray's sockets, and always removed.

A cluster's reaper removes its folder. If the reaper was killed too, as SLURM may do, the next start on that machine
does: a folder with our marker has no owner once the marker's lock is free. Folders without a marker are somebody
else's, whatever their name.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import stat
import sys
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


def scratch_parent() -> Path:
    """Where clusters' folders are: TMPDIR if that path is short enough and has no spaces, else /tmp."""
    parent = Path(tempfile.gettempdir())
    if len(str(parent / PREFIX)) + 8 > LONGEST or re.search(r"\s", str(parent)):
        parent = Path("/tmp")
    return parent


def new_scratch() -> tuple[Path, int]:
    """A new folder that only this user can enter, and the descriptor of its marker file, which is locked.

    Abandoned folders of this user are removed.
    """
    parent = scratch_parent()
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


def python_for_ray(scratch: Path) -> str:
    """Path of this Python by which Ray can start workers: it puts the path into a shell's command line as it is.

    If that would split the path, as spaces do, it leads through a link in `scratch` to the virtual environment. Errors:
    ValueError if there is none.
    """
    if shlex.quote(sys.executable) == sys.executable:
        return sys.executable
    environment = Path(sys.prefix)
    if sys.prefix == sys.base_prefix or not Path(sys.executable).is_relative_to(environment):
        raise ValueError(
            f"{sys.executable!r}: Ray cannot start a Python whose path has spaces or other special characters; use a "
            "virtual environment, or move it"
        )
    link = scratch / "python"
    if not link.exists():
        link.symlink_to(environment)
    return str(link / Path(sys.executable).relative_to(environment))


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
