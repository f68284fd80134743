"""Ends a worker that hangs. Wall-clock time affects nothing else in a run."""

from __future__ import annotations

import faulthandler
import os
import threading
import time
from pathlib import Path

from pipeline.run.files import open_to_append

EXIT_HUNG = 70
"""Exit code of a worker that the watchdog ended (EX_SOFTWARE)."""


class Watchdog:
    """Logs all stacks and ends this process if `beat` is not called for `deadline_s`; Ray then replaces it.

    A process that is frozen as a whole cannot end itself; it fails Ray's health check.
    """

    def __init__(self, deadline_s: float, stacks: Path) -> None:
        self._deadline_s = deadline_s
        self._stacks = stacks
        self._beat_at = time.monotonic()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def beat(self) -> None:
        self._beat_at = time.monotonic()

    def close(self) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(min(5.0, self._deadline_s / 4)):
            silent_s = time.monotonic() - self._beat_at
            if silent_s > self._deadline_s:
                with open_to_append(self._stacks) as stream:
                    print(f"no step for {silent_s:.0f} s (workers.hang_timeout_s); where every thread is:", file=stream)
                    faulthandler.dump_traceback(stream, all_threads=True)
                os._exit(EXIT_HUNG)
