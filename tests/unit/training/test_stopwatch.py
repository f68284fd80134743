"""Time is attributed exactly, and a GPU is synchronized only when the stopwatch is read."""

from __future__ import annotations

import pytest
import torch

from pipeline.training import stopwatch
from pipeline.training.stopwatch import Stopwatch

CPU = torch.device("cpu")


class Clock:
    """A time that stands still until a test moves it."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(stopwatch, "time", clock)
    return clock


def step(watch: Stopwatch, clock: Clock) -> None:
    """1 s of data, 4 s of attack and 16 s of checkpoint, with 2 s of update after each."""
    for part, seconds in (("data", 1), ("attack", 4), ("checkpoint", 16)):
        with watch.during(part):
            clock.now += seconds
        clock.now += 2


def test_every_second_counts_for_one_part(clock: Clock) -> None:
    watch = Stopwatch(CPU)
    step(watch, clock)
    step(watch, clock)
    assert watch.read() == {"data": 2, "attack": 8, "update": 12, "checkpoint": 32}
    step(watch, clock)
    assert watch.read() == {"data": 1, "attack": 4, "update": 6, "checkpoint": 16}
    assert watch.read() == dict.fromkeys(("data", "attack", "update", "checkpoint"), 0)


def test_a_part_inside_another_and_an_error_give_back_what_was_before(clock: Clock) -> None:
    watch = Stopwatch(CPU)

    def fail() -> None:
        with watch.during("attack"):
            clock.now += 1
            with watch.during("data"):
                clock.now += 2
            clock.now += 4
            raise OSError("no more")

    with pytest.raises(OSError, match="no more"):
        fail()
    clock.now += 8
    assert watch.read() == {"data": 2, "attack": 5, "update": 8, "checkpoint": 0}


def test_restart_forgets(clock: Clock) -> None:
    watch = Stopwatch(CPU)
    step(watch, clock)
    clock.now += 50  # the held-out images, whose row has its own seconds
    watch.restart()
    clock.now += 1
    assert watch.read() == {"data": 0, "attack": 0, "update": 1, "checkpoint": 0}


def test_a_gpu_is_synchronized_once_per_reading(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """Events as CUDA has them: they happen when the GPU comes to them, and asking earlier is an error."""
    waited: list[Event] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing
            self.at: float | None = None

        def record(self) -> None:
            self.at = clock.now

        def synchronize(self) -> None:
            waited.append(self)

        def elapsed_time(self, end: Event) -> float:
            assert waited, "not ready"
            assert self.at is not None
            assert end.at is not None
            return 1000 * (end.at - self.at)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    watch = Stopwatch(torch.device("cuda", 0))
    step(watch, clock)
    assert waited == []
    assert watch.read() == {"data": 1, "attack": 4, "update": 6, "checkpoint": 16}
    assert len(waited) == 1
