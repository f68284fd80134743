"""Times of functions that run alternately, so that other load on the machine affects all of them alike."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence

from pipeline.run.benchmark import Spread

FEWEST_ROUNDS, MOST_ROUNDS = 3, 25
SECONDS = 15.0
"""All rounds together, if that is not fewer than FEWEST_ROUNDS."""
SAMPLE_S = 0.02
"""A measurement repeats a shorter function until it takes this long."""
LONG_S = 0.5
"""A function that takes this long is not warmed up: what ran before is little of it."""


def alternate(
    functions: Sequence[Callable[[], object]],
    on_round: Callable[[int, int], None],
    clock: Callable[[], float],
) -> list[list[float]]:
    """Seconds of one call: for each function, one measurement per round.

    Every function runs first to be warmed up, and a short one once before each measurement, too, as caches and threads
    are those of the one before it. Every second round is in reverse order. `on_round` is told how many rounds are done,
    and how many there are.
    """
    warm_ups, calls, round_s = [], [], 0.0
    for function in functions:
        once = _seconds_of(function, clock)
        if once < LONG_S:
            once = _seconds_of(function, clock)
        warm_ups.append(int(once < LONG_S))
        calls.append(math.ceil(SAMPLE_S / once))
        round_s += (warm_ups[-1] + calls[-1]) * once
    rounds = min(max(int(SECONDS / round_s), FEWEST_ROUNDS), MOST_ROUNDS)
    seconds: list[list[float]] = [[] for _ in functions]
    for number in range(rounds):
        places = range(len(functions))
        for place in places if number % 2 == 0 else reversed(places):
            for _ in range(warm_ups[place]):
                functions[place]()
            seconds[place].append(_seconds_of(functions[place], clock, calls[place]))
        on_round(number + 1, rounds)
    return seconds


def _seconds_of(function: Callable[[], object], clock: Callable[[], float], calls: int = 1) -> float:
    """Of one call, as the mean of `calls`."""
    start = clock()
    for _ in range(calls):
        function()
    return max(clock() - start, 1e-6) / calls


def spread(values: Sequence[float]) -> Spread:
    return Spread(median=statistics.median(values), low=min(values), high=max(values))


def ratios(above: Sequence[float], below: Sequence[float]) -> Spread:
    """Of above / below, round by round."""
    return spread([a / b for a, b in zip(above, below, strict=True)])
