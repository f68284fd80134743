"""Measures where the time of a stage's steps goes, without stalling a GPU."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch

from pipeline.run.tracking.metrics import PARTS


class _Moment:
    """A reading of the CPU clock, with the interface of a CUDA event."""

    def __init__(self) -> None:
        self._at = time.perf_counter()

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def elapsed_time(self, end: _Moment) -> float:
        """Milliseconds."""
        return 1000.0 * (end._at - self._at)


class Stopwatch:
    """Runs from construction on, for exactly one part at any moment, so the parts' seconds add up to the total.

    A GPU runs asynchronously, and synchronizing at every mark would slow it down. So marks are CUDA events, queued with
    the work, and evaluated in `read`; the time between them includes idle time, such as waiting for images. On a CPU
    they are readings of a clock.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._part = "update"
        self.restart()

    def restart(self) -> None:
        """Forget the time since the last reading."""
        self._marks: list[tuple[str, Any]] = []  # (part that starts, when)
        self._mark()

    @contextmanager
    def during(self, part: str) -> Iterator[None]:
        """Count time for `part`, one of PARTS, then again for the previous part."""
        previous, self._part = self._part, part
        self._mark()
        try:
            yield
        finally:
            self._part = previous
            self._mark()

    def read(self) -> dict[str, float]:
        """Seconds spent in each part since the last reading or restart. On a GPU this waits for the queued work."""
        self._mark()
        self._marks[-1][1].synchronize()
        seconds = dict.fromkeys(PARTS, 0.0)
        for (part, start), (_, end) in pairwise(self._marks):
            seconds[part] += start.elapsed_time(end) / 1000.0
        self._marks = self._marks[-1:]
        return seconds

    def _mark(self) -> None:
        """Count time for the current part from now on."""
        if self._on_gpu:
            now = torch.cuda.Event(enable_timing=True)
            now.record()
        else:
            now = _Moment()
        self._marks.append((self._part, now))
