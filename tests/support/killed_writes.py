"""Kills what writes files at each of them in turn: before it is renamed into place, and after."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock


class Killed(BaseException):
    """The process ends at once."""


def kill_at_every_file(folder: Path, write: Callable[[], object]) -> Iterator[bool]:
    """Empty `folder` but for leases, and call `write` until it is killed; yields whether that was before the rename.

    Once for each file, before and after; ends when a call was not killed.
    """
    replace = os.replace
    for before in (True, False):
        for count in range(100):
            for path in folder.iterdir():
                if "lease" not in path.name:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            calls = iter(range(100))

            def killing(
                source: Any, target: Any, calls: Iterator[int] = calls, count: int = count, before: bool = before
            ) -> None:
                dies = next(calls) == count
                if not (dies and before):
                    replace(source, target)
                if dies:
                    raise Killed

            try:
                with mock.patch("os.replace", killing):
                    write()
            except Killed:
                yield before
            else:
                break
