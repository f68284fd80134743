"""Position in a stage: counting, and a lossless round trip through JSON."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.run.progress import Progress, Window

unhurried = settings(suppress_health_check=[HealthCheck.too_slow])

counts = st.integers(0, 10**12)
finite = st.floats(allow_nan=False, allow_infinity=False)
windows = st.builds(Window, finite, counts, counts, counts, counts)
positions = st.builds(
    Progress,
    step=counts,
    steps_per_epoch=st.integers(1, 10**6),
    total_steps=counts,
    window=windows,
    best_step=st.none() | counts,
    best_robust_accuracy=st.floats(-1, 1),
    level=st.integers(0, 4),
    good_step=st.none() | counts,
)


@unhurried
@given(progress=positions)
def test_json_loses_nothing(progress: Progress) -> None:
    assert Progress.from_json(json.loads(json.dumps(progress.to_json()))) == progress


@unhurried
@given(steps_per_epoch=st.integers(1, 7), epochs=st.integers(1, 4))
def test_a_stage_counted_step_by_step(steps_per_epoch: int, epochs: int) -> None:
    progress = Progress(0, steps_per_epoch, steps_per_epoch * epochs)
    ends = 0
    for step in range(steps_per_epoch * epochs):
        assert not progress.finished
        assert progress.step == step
        progress = progress.after_step(Window(steps=step + 1))
        assert progress.window.steps == step + 1
        ends += progress.at_epoch_end
    assert progress.finished
    assert ends == epochs


def test_no_epoch_has_ended_before_the_first_step() -> None:
    assert not Progress(0, 5, 10).at_epoch_end


def test_after_a_window_only_its_sums_are_reset() -> None:
    progress = Progress(3, 5, 10, Window(1.5, 2, 3, 4, 5), 2, 0.5)
    assert progress.after_window() == Progress(3, 5, 10, Window(), 2, 0.5)


@unhurried
@given(accuracies=st.lists(st.floats(0, 1), min_size=1, max_size=9))
def test_the_best_step_is_the_first_with_the_highest_accuracy(accuracies: list[float]) -> None:
    progress = Progress(0, 1, len(accuracies))
    for accuracy in accuracies:
        progress = progress.after_step(Window()).with_best(accuracy)
    assert progress.best_robust_accuracy == max(accuracies)
    assert progress.best_step == 1 + accuracies.index(max(accuracies))  # 0.0 is better than nothing


def test_a_good_step_stays_until_the_next_one() -> None:
    progress = Progress(5, 5, 10, level=2).with_good_step()
    assert progress == Progress(5, 5, 10, level=2, good_step=5)
    assert progress.after_step(Window()).with_best(0.5).good_step == 5


def test_a_checkpoint_without_levels_is_read() -> None:
    values = Progress(3, 5, 10, best_step=2).to_json()
    del values["level"], values["good_step"]
    assert Progress.from_json(values) == Progress(3, 5, 10, best_step=2)


def test_positions_are_immutable() -> None:
    with pytest.raises(FrozenInstanceError):
        Progress(0, 1, 1).step = 1  # pyright: ignore[reportAttributeAccessIssue]
