"""Times of functions that run alternately, so that other load on the machine affects all of them alike."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence

from pipeline.run.benchmark import Spread

FEWEST_ROUNDS, MOST_ROUNDS = 5, 25
SECONDS = 15.0
"""All rounds together, if that is not fewer than FEWEST_ROUNDS."""
SAMPLE_S = 0.02
"""A measurement repeats a shorter function until it takes this long."""


def alternate(
    functions: Sequence[Callable[[], object]],
    on_round: Callable[[int, int], None],
    clock: Callable[[], float],
) -> list[list[float]]:
    """Seconds of one call: for each function, one measurement per round.

    Every function runs twice to warm up, and once without being measured before each measurement, as caches and
    threads are those of the one before it. Every second round is in reverse order. `on_round` is told how many rounds
    are done, and how many there are.
    """
    calls, round_s = [], 0.0
    for function in functions:
        function()
        start = clock()
        function()
        once = max(clock() - start, 1e-6)
        calls.append(math.ceil(SAMPLE_S / once))
        round_s += (calls[-1] + 1) * once
    rounds = min(max(int(SECONDS / round_s), FEWEST_ROUNDS), MOST_ROUNDS)
    seconds: list[list[float]] = [[] for _ in functions]
    for number in range(rounds):
        places = range(len(functions))
        for place in places if number % 2 == 0 else reversed(places):
            function = functions[place]
            function()
            start = clock()
            for _ in range(calls[place]):
                function()
            seconds[place].append((clock() - start) / calls[place])
        on_round(number + 1, rounds)
    return seconds


def spread(values: Sequence[float]) -> Spread:
    return Spread(median=statistics.median(values), low=min(values), high=max(values))


def ratios(above: Sequence[float], below: Sequence[float]) -> Spread:
    """Of above / below, round by round."""
    return spread([a / b for a, b in zip(above, below, strict=True)])
