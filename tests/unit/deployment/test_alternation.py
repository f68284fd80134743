"""Functions are measured in turn, so that a slowdown of the machine does not change their ratios. No real clock."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from pipeline.deployment.alternation import FEWEST_ROUNDS, MOST_ROUNDS, SECONDS, alternate, ratios, spread
from pipeline.run.benchmark import Spread


class Machine:
    """Its clock advances when a function runs, and runs slower from one call to the next as `load` says."""

    def __init__(self, load: Callable[[int], float] = lambda calls: 1.0) -> None:
        self.now, self.calls, self.load = 0.0, 0, load
        self.order: list[str] = []

    def function(self, name: str, seconds: float) -> Callable[[], None]:
        def run() -> None:
            self.order.append(name)
            self.now += seconds * self.load(self.calls)
            self.calls += 1

        return run

    def clock(self) -> float:
        return self.now


def nothing(done: int, total: int) -> None:
    pass


def test_every_second_round_is_in_reverse_order_and_each_measurement_is_warmed_up() -> None:
    machine = Machine()
    functions = [machine.function(name, 0.02) for name in "abc"]
    told: list[tuple[int, int]] = []
    seconds = alternate(functions, lambda done, total: told.append((done, total)), machine.clock)
    assert told == [(done, MOST_ROUNDS) for done in range(1, MOST_ROUNDS + 1)]
    assert "".join(machine.order[:6]) == "aabbcc"
    assert "".join(machine.order[6:18]) == "aabbccccbbaa"
    assert [len(values) for values in seconds] == [MOST_ROUNDS] * 3
    assert all(value == pytest.approx(0.02) for values in seconds for value in values)


def test_short_functions_are_repeated_within_a_measurement() -> None:
    machine = Machine()
    (seconds,) = alternate([machine.function("a", 0.004)], nothing, machine.clock)
    assert len(machine.order) == 2 + MOST_ROUNDS * (1 + 5)
    assert seconds == [pytest.approx(0.004)] * MOST_ROUNDS


def test_slow_functions_have_fewer_rounds() -> None:
    machine = Machine()
    (seconds,) = alternate([machine.function("a", SECONDS / 10)], nothing, machine.clock)
    assert len(seconds) == 10
    machine.order.clear()
    (seconds,) = alternate([machine.function("a", 10 * SECONDS)], nothing, machine.clock)
    assert len(seconds) == FEWEST_ROUNDS
    assert len(machine.order) == 1 + FEWEST_ROUNDS, "a long one is not warmed up again"


def test_ratios_hold_while_other_load_grows() -> None:
    machine = Machine(lambda calls: 1.02**calls)  # nobody else's round sees the same machine
    slow, fast = alternate([machine.function("a", 0.4), machine.function("b", 0.1)], nothing, machine.clock)
    assert max(slow) > 2 * min(slow)
    assert ratios(slow, fast).low > 3.7
    assert ratios(slow, fast).high < 4.3


def test_a_spread_is_median_and_extremes() -> None:
    assert spread([3.0, 1.0, 2.0, 9.0]) == Spread(median=2.5, low=1.0, high=9.0)
    assert ratios([2.0, 9.0, 4.0], [1.0, 3.0, 1.0]) == Spread(median=3.0, low=2.0, high=4.0)
