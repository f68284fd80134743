"""Where the time of a stage's steps goes, told without holding a GPU up."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch

from pipeline.run.tracking.metrics import PARTS


class _Moment:
    """A reading of the processor's clock, asked as a CUDA event is."""

    def __init__(self) -> None:
        self._at = time.perf_counter()

    def synchronize(self) -> None:
        """It is over when it is read."""

    def elapsed_time(self, end: _Moment) -> float:
        """Milliseconds."""
        return 1000.0 * (end._at - self._at)


class Stopwatch:
    """Runs from the beginning, and at any moment for one part only, so that the parts' seconds add up to the whole.

    A GPU works behind the program that feeds it, and waiting for it at every mark would slow both down. So marks are
    CUDA events, queued with the work, and what lies between two of them is known when somebody reads: also how long the
    GPU had nothing to do, as while images are waited for. On a CPU they are readings of a clock.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._part = "update"
        self.restart()

    def restart(self) -> None:
        """Forget the time since the last reading."""
        self._marks: list[tuple[str, Any]] = []  # what was begun, and when
        self._mark()

    @contextmanager
    def during(self, part: str) -> Iterator[None]:
        """Run for `part`, one of PARTS, and afterwards for what it ran for before."""
        before, self._part = self._part, part
        self._mark()
        try:
            yield
        finally:
            self._part = before
            self._mark()

    def read(self) -> dict[str, float]:
        """Seconds spent in each part since the last reading or restart. On a GPU this waits for what is queued."""
        self._mark()
        self._marks[-1][1].synchronize()
        seconds = dict.fromkeys(PARTS, 0.0)
        for (part, begun), (_, ended) in pairwise(self._marks):
            seconds[part] += begun.elapsed_time(ended) / 1000.0
        self._marks = self._marks[-1:]
        return seconds

    def _mark(self) -> None:
        """From now on time is spent in the part under way."""
        if self._on_gpu:
            now = torch.cuda.Event(enable_timing=True)
            now.record()
        else:
            now = _Moment()
        self._marks.append((self._part, now))
