"""What several tests need and one makes, such as written data and undisturbed runs: in one folder of a session.

Processes of pytest-xdist share a folder by themselves; several calls of pytest (`run_all`) are given one.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

FOLDER = "HYDRA_TEST_SHARED"
"""Names the folder, where several calls of pytest share one."""


def shared_folder(factory: pytest.TempPathFactory) -> Path:
    """The folder of this session, which its processes may write at the same time."""
    if (given := os.environ.get(FOLDER)) is not None:
        return Path(given)
    base = factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"
    folder.mkdir(exist_ok=True)
    return folder


def made_once(place: Path, make: Callable[[Path], object]) -> Path:
    """`place`, a folder that `make` creates; whoever comes meanwhile waits. What a failure left is made again."""
    done = place.with_name(f"{place.name}.done")
    with place.with_name(f"{place.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            shutil.rmtree(place, ignore_errors=True)
            make(place)
            done.touch()
    return place
