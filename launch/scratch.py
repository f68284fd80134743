"""Temporary folders of clusters: private, short enough for Ray's sockets, and removed even when all were killed.

A cluster's guard removes its folder. Where SLURM killed the guard too, the next start on the same node does.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from pathlib import Path

LONGEST = 42
"""Characters of a path below which Ray's sockets stay within the 107 that Linux allows."""


def new_scratch(owner: str = "") -> Path:
    """A new folder that only this user can enter, below TMPDIR if that is short enough and below /tmp otherwise.

    `owner` names whoever has only one at a time, such as a job's task on one node: what an earlier one of the same
    owner left behind is removed.
    """
    prefix = f"hydra-{hashlib.sha256(owner.encode()).hexdigest()[:12]}-" if owner else "hydra-"
    parent = Path(tempfile.gettempdir())
    if len(str(parent / prefix)) + 8 > LONGEST:
        parent = Path("/tmp")
    for left in parent.glob(f"{prefix}*") if owner else []:
        if left.stat().st_uid == os.getuid():
            shutil.rmtree(left, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
