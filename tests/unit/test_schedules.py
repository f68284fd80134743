"""Learning rates and attack strengths: end points, shape, closed form."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.recipe_sections import Phase
from pipeline.schedules import lr_at, strength_at


@st.composite
def phases(draw: st.DrawFn) -> Phase:
    epochs = draw(st.integers(1, 20))
    warmup = draw(st.floats(0, epochs - 0.5))
    return Phase(epochs=epochs, lr=draw(st.floats(1e-4, 1.0)), warmup_epochs=warmup)


def rates(phase: Phase, steps_per_epoch: int) -> list[float]:
    return [lr_at(phase, step, steps_per_epoch) for step in range(phase.epochs * steps_per_epoch)]


@given(phases(), st.integers(2, 40))
@settings(deadline=None)
def test_rises_to_lr_then_falls(phase: Phase, steps_per_epoch: int) -> None:
    values = rates(phase, steps_per_epoch)
    warmup = round(phase.warmup_epochs * steps_per_epoch)
    rounding = 1e-15 * phase.lr  # (lr * n) / n may miss lr by one unit in the last place
    assert all(0 < value <= phase.lr + rounding for value in values)
    assert all(later >= earlier - rounding for earlier, later in pairwise(values[: warmup + 1]))
    assert all(later < earlier for earlier, later in pairwise(values[warmup:]))
    assert values[warmup] == phase.lr


@given(phases(), st.integers(2, 40))
@settings(deadline=None)
def test_reaches_zero_one_step_after_the_last(phase: Phase, steps_per_epoch: int) -> None:
    total = phase.epochs * steps_per_epoch
    annealed = total - round(phase.warmup_epochs * steps_per_epoch)
    # One step before the zero of 0.5 (1 + cos(pi t)) it is sin^2(pi / 2T).
    expected = phase.lr * math.sin(math.pi / (2 * annealed)) ** 2
    assert lr_at(phase, total - 1, steps_per_epoch) == pytest.approx(expected, rel=1e-6)


def test_warm_up_is_linear_and_cosine_is_half_way_down_in_the_middle() -> None:
    phase = Phase(epochs=10, lr=0.4, warmup_epochs=2)
    assert [lr_at(phase, step, 2) for step in range(4)] == pytest.approx([0.1, 0.2, 0.3, 0.4])
    assert lr_at(phase, 4 + 8, 2) == pytest.approx(0.2)


def test_constant_stays_after_the_warm_up() -> None:
    phase = Phase(epochs=3, lr=0.5, warmup_epochs=1, schedule="constant")
    assert rates(phase, 2) == [0.25, 0.5, 0.5, 0.5, 0.5, 0.5]


@pytest.mark.parametrize("step", [-1, 20, 21])
def test_a_step_outside_the_phase_is_refused(step: int) -> None:
    with pytest.raises(ValueError, match=f"step {step} is outside the phase's 20 steps"):
        lr_at(Phase(epochs=10, lr=0.1), step, 2)


@given(st.floats(0, 1, exclude_max=True), st.floats(0, 1, exclude_min=True, exclude_max=True))
@settings(deadline=None)
def test_an_attack_grows_in_proportion_to_the_share_of_its_warm_up(elapsed: float, warmup: float) -> None:
    strength = strength_at(elapsed, warmup)
    if elapsed >= warmup:
        assert strength == 1.0
    else:
        assert strength * warmup == pytest.approx(elapsed, rel=1e-12, abs=1e-300)
    assert strength_at(elapsed, 0.0) == 1.0
