"""The stop file, by which a run is asked to stop; its workers agree on it at the next step.

A file and not a signal, since the train function runs outside the main thread, where signals do not arrive.
"""

from __future__ import annotations

import time
from pathlib import Path

POLL_S = 0.5
"""Interval between a worker's checks for the stop file; each costs a call to a shared file system."""


class StopRequested(RuntimeError):
    """The run was asked to stop; its state up to this step is in a checkpoint."""


class StopFile:
    """`requested()` is true once the file has existed; without a path, never."""

    def __init__(self, path: Path | None, poll_s: float = POLL_S) -> None:
        self._path, self._poll_s = path, poll_s
        self._checked_at = float("-inf")
        self._requested = False

    def requested(self) -> bool:
        now = time.monotonic()
        if self._path is not None and not self._requested and now - self._checked_at >= self._poll_s:
            self._checked_at = now
            self._requested = self._path.exists()
        return self._requested
