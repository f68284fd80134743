"""How a run is asked to stop: by a file, which its workers check, and which they agree on at the next step.

The train function runs outside the main thread, where no signal arrives.
"""

from __future__ import annotations

import time
from pathlib import Path

POLL_S = 0.5
"""How often a worker checks whether the stop file is there; a check costs a call to a shared file system."""


class StopRequested(RuntimeError):
    """The run was asked to stop; everything up to here is in a checkpoint."""


class StopFile:
    """`requested()` is true once the file is there; without a file, never."""

    def __init__(self, path: Path | None, poll_s: float = POLL_S) -> None:
        self._path, self._poll_s = path, poll_s
        self._checked_at = float("-inf")
        self._found = False

    def requested(self) -> bool:
        now = time.monotonic()
        if self._path is not None and not self._found and now - self._checked_at >= self._poll_s:
            self._checked_at = now
            self._found = self._path.exists()
        return self._found
