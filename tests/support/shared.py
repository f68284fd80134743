"""Data and runs that one test creates and several use, in one folder per session.

Processes of pytest-xdist share a folder by default; `run_all` passes one to its calls of pytest.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.run.locks import exclusive

FOLDER = "HYDRA_TEST_SHARED"
"""Environment variable with the folder that several calls of pytest share."""


def shared_folder(factory: pytest.TempPathFactory) -> Path:
    """The folder of this session, to which its processes may write at the same time."""
    if (name := os.environ.get(FOLDER)) is not None:
        return Path(name)
    base = factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"
    folder.mkdir(exist_ok=True)
    return folder


def made_once(place: Path, make: Callable[[Path], object]) -> Path:
    """`place`, a folder that `make` creates at the first call, and again after a failure; concurrent calls wait."""
    done = place.with_name(f"{place.name}.done")
    with exclusive(place.with_name(f"{place.name}.lock")):
        if not done.exists():
            shutil.rmtree(place, ignore_errors=True)
            make(place)
            done.touch()
    return place
