"""Learning rates, image sizes and attack strengths: endpoints, shape, closed form."""

from __future__ import annotations

import math
from decimal import Decimal
from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.optim.lr_scheduler import OneCycleLR

from pipeline.recipe.learning_rate import Constant
from pipeline.recipe.phase import Phase, Resolution
from pipeline.recipe.schedules import drop_fraction_at, image_size_at, kept_fraction_at, lr_at, strength_at


@st.composite
def phases(draw: st.DrawFn) -> Phase:
    epochs = draw(st.integers(1, 20))
    warmup = round(draw(st.floats(0, epochs - 0.5)), 6)
    return Phase(epochs=epochs, lr=draw(st.floats(1e-4, 1.0)), warmup_epochs=warmup)


def scheduled(phase: Phase, **schedule: object) -> Phase:
    """The phase with another schedule."""
    return Phase.model_validate({**phase.model_dump(mode="json"), "schedule": schedule})


def rates(phase: Phase, steps_per_epoch: int) -> list[float]:
    return [lr_at(phase, step, steps_per_epoch) for step in range(phase.epochs * steps_per_epoch)]


@given(phases(), st.integers(2, 40))
def test_rises_to_lr_then_falls(phase: Phase, steps_per_epoch: int) -> None:
    values = rates(phase, steps_per_epoch)
    warmup = round(phase.warmup_epochs * steps_per_epoch)
    rounding = 1e-15 * phase.lr  # (lr * n) / n may miss lr by one unit in the last place
    assert all(0 < value <= phase.lr + rounding for value in values)
    assert all(later >= earlier - rounding for earlier, later in pairwise(values[: warmup + 1]))
    assert all(later < earlier for earlier, later in pairwise(values[warmup:]))
    assert values[warmup] == phase.lr


@given(phases(), st.integers(2, 40))
def test_reaches_zero_one_step_after_the_last(phase: Phase, steps_per_epoch: int) -> None:
    total = phase.epochs * steps_per_epoch
    annealed = total - round(phase.warmup_epochs * steps_per_epoch)
    # One step before the zero of 0.5 (1 + cos(pi t)) it is sin^2(pi / 2T).
    expected = phase.lr * math.sin(math.pi / (2 * annealed)) ** 2
    assert lr_at(phase, total - 1, steps_per_epoch) == pytest.approx(expected, rel=1e-6)


def test_warm_up_is_linear_and_the_cosine_is_at_half_in_the_middle() -> None:
    phase = Phase(epochs=10, lr=0.4, warmup_epochs=2)
    assert [lr_at(phase, step, 2) for step in range(4)] == pytest.approx([0.1, 0.2, 0.3, 0.4])
    assert lr_at(phase, 4 + 8, 2) == pytest.approx(0.2)


@given(phases(), st.integers(2, 40), st.just(0.0) | st.floats(1e-6, 0.99))
def test_a_cosine_may_end_at_a_fraction_of_lr(phase: Phase, steps_per_epoch: int, fraction: float) -> None:
    """It is the weighted mean of the constant and the cosine that ends at zero, which keeps its numbers to the bit."""
    total, warmup = phase.epochs * steps_per_epoch, round(phase.warmup_epochs * steps_per_epoch)
    values = rates(scheduled(phase, name="cosine", final_lr_fraction=fraction), steps_per_epoch)
    to_zero = rates(phase, steps_per_epoch)
    assert values[:warmup] == to_zero[:warmup]
    for step in range(warmup, total):
        assert to_zero[step] == phase.lr * 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / (total - warmup)))
        assert values[step] == pytest.approx(fraction * phase.lr + (1 - fraction) * to_zero[step], rel=1e-12)


@given(st.integers(2, 30), st.integers(1, 20), st.integers(0, 5), st.floats(1e-4, 1.0))
def test_hydras_cosine_is_the_references(epochs: int, steps_per_epoch: int, warmup: int, lr: float) -> None:
    """epoch - 1 with epochs counted from 0, after warm-up epochs: the first and the third have the same rate."""
    phase = Phase.model_validate({"epochs": warmup + epochs, "lr": lr, "warmup_epochs": warmup, "schedule": "hydra"})
    reference = [lr * 0.5 * (1 + math.cos((epoch - 1) / epochs * math.pi)) for epoch in range(epochs)]
    values = rates(phase, steps_per_epoch)[warmup * steps_per_epoch :]
    assert values == pytest.approx([rate for rate in reference for _ in range(steps_per_epoch)], rel=1e-12)
    assert values[steps_per_epoch] == lr


def test_hydras_cosine_hardly_anneals_over_few_epochs() -> None:
    phase = Phase.model_validate({"epochs": 5, "lr": 0.1, "schedule": "hydra"})
    assert rates(phase, 1) == pytest.approx([0.0905, 0.1, 0.0905, 0.0655, 0.0345], abs=5e-5)


def test_hydras_cosine_after_a_warm_up_of_part_of_an_epoch() -> None:
    """Its epochs begin after the warm-up, so the last of its 2.5 is half as long."""
    phase = Phase.model_validate({"epochs": 3, "lr": 0.1, "warmup_epochs": 0.5, "schedule": "hydra"})
    first, last = (0.05 * (1 + math.cos(epoch / 2.5 * math.pi)) for epoch in (-1, 1))
    assert rates(phase, 4) == pytest.approx([0.05, 0.1, *[first] * 4, *[0.1] * 4, *[last] * 2])


@given(st.integers(2, 200), st.floats(1e-4, 1.0), st.just(0.0) | st.floats(1e-6, 0.9))
def test_onecycle_is_torchs(epochs: int, lr: float, fraction: float) -> None:
    phase = Phase.model_validate(
        {"epochs": epochs, "lr": lr, "schedule": {"name": "onecycle", "final_lr_fraction": fraction}}
    )
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=lr)
    divisor = 1 / (25 * fraction) if fraction else math.inf  # of the first rate, which is lr / 25
    schedule = OneCycleLR(optimizer, lr, total_steps=epochs, cycle_momentum=False, final_div_factor=divisor)
    for step in range(epochs):
        assert lr_at(phase, step, 1) == pytest.approx(schedule.get_last_lr()[0], rel=1e-9, abs=1e-15)
        optimizer.step()
        if step + 1 < epochs:
            schedule.step()


def test_constant_stays_after_the_warm_up() -> None:
    phase = Phase(epochs=3, lr=0.5, warmup_epochs=1, schedule=Constant())
    assert rates(phase, 2) == [0.25, 0.5, 0.5, 0.5, 0.5, 0.5]


def test_steps_drop_the_rate_at_fractions_of_the_phase() -> None:
    schedule = {"name": "step", "milestones": [0.5, 0.75], "factor": 0.1}
    phase = Phase.model_validate({"epochs": 4, "lr": 0.5, "warmup_epochs": 1, "schedule": schedule})
    assert rates(phase, 2) == pytest.approx([0.25, 0.5, 0.5, 0.5, 0.05, 0.05, 0.005, 0.005])
    assert phase.model_dump(mode="json")["schedule"] == schedule


@pytest.mark.parametrize("name", ["cosine", "hydra", "onecycle", "constant"])
def test_a_schedule_at_its_defaults_is_written_as_its_name(name: str) -> None:
    """As in older recipes, whose hashes depend on it."""
    phase = Phase.model_validate({"epochs": 4, "lr": 0.5, "schedule": name})
    assert phase == Phase.model_validate({"epochs": 4, "lr": 0.5, "schedule": {"name": name}})
    assert phase.model_dump(mode="json")["schedule"] == name


@pytest.mark.parametrize("name", ["cosine", "onecycle"])
def test_a_schedule_with_another_end_is_written_with_it(name: str) -> None:
    schedule = {"name": name, "final_lr_fraction": 0.1}
    phase = Phase.model_validate({"epochs": 4, "lr": 0.5, "schedule": schedule})
    assert phase.model_dump(mode="json")["schedule"] == schedule
    assert Phase.model_validate(phase.model_dump(mode="json")) == phase
    default = Phase.model_validate({"epochs": 4, "lr": 0.5, "schedule": {**schedule, "final_lr_fraction": 0}})
    assert default.model_dump(mode="json")["schedule"] == name


@given(st.floats(0.01, 100), st.integers(1, 10**6))
def test_the_weight_of_a_step_in_an_average_falls_to_1_over_e_within_its_horizon(
    horizon: float, steps_per_epoch: int
) -> None:
    decay = Phase(epochs=2, lr=0.1, ema_epochs=horizon).ema_decay_per_step(steps_per_epoch)
    assert decay is not None
    assert decay < 1
    assert decay ** (horizon * steps_per_epoch) == pytest.approx(1 / math.e, rel=1e-6)


def test_an_average_is_given_in_epochs_or_as_decay_per_step_or_there_is_none() -> None:
    phase = {"epochs": 2, "lr": 0.1}
    averages = [Phase.model_validate(phase | keys) for keys in ({"ema_epochs": 2}, {"ema_decay": 0.9}, {})]
    assert [one.is_averaged for one in averages] == [True, True, False]
    assert [one.ema_decay_per_step(5) for one in averages] == [pytest.approx(math.exp(-0.1)), 0.9, None]


@pytest.mark.parametrize("step", [-1, 20, 21])
def test_a_step_outside_the_phase_is_refused(step: int) -> None:
    with pytest.raises(ValueError, match=f"step {step} is outside the phase's 20 steps"):
        lr_at(Phase(epochs=10, lr=0.1), step, 2)


@given(st.floats(0, 1, exclude_max=True), st.floats(0, 1, exclude_min=True, exclude_max=True))
def test_an_attack_grows_linearly_over_its_warm_up(elapsed: float, warmup: float) -> None:
    strength = strength_at(elapsed, warmup)
    if elapsed >= warmup:
        assert strength == 1.0
    else:
        assert strength * warmup == pytest.approx(elapsed, rel=1e-12, abs=1e-300)
    assert strength_at(elapsed, 0.0) == 1.0


@st.composite
def resized_phases(draw: st.DrawFn) -> tuple[Phase, int]:
    """A phase with progressive resizing, and its final image size."""
    epochs = draw(st.integers(2, 60))
    full_from = draw(st.integers(1, epochs - 1))
    smallest = 32 * draw(st.integers(1, 31))
    resolution = Resolution(smallest=smallest, grows_from=draw(st.integers(0, full_from - 1)), full_from=full_from)
    return Phase(epochs=epochs, lr=0.1, resolution=resolution), draw(st.integers(smallest + 1, 1024))


@given(resized_phases())
def test_images_grow_from_the_smallest_to_the_full_size(resized: tuple[Phase, int]) -> None:
    phase, full = resized
    resolution = phase.resolution
    assert resolution is not None
    sizes = [image_size_at(phase, full, epoch) for epoch in range(phase.epochs)]
    assert sizes[: resolution.grows_from + 1] == [resolution.smallest] * (resolution.grows_from + 1)
    assert sizes[resolution.full_from :] == [full] * (phase.epochs - resolution.full_from)
    assert sizes == sorted(sizes)
    assert all(size % 32 == 0 or size == full for size in sizes)
    slope = (full - resolution.smallest) / (resolution.full_from - resolution.grows_from)
    for epoch in range(resolution.grows_from, resolution.full_from):
        assert abs(sizes[epoch] - resolution.smallest - slope * (epoch - resolution.grows_from)) <= 16 + 1e-6


def test_sizes_are_those_of_ffcv_imagenets_88_epochs() -> None:
    """160 pixels, then 192 from epoch 71 on: rounding turns its ramp from epoch 65 to 76 into a single jump."""
    phase = Phase(epochs=88, lr=0.1, resolution=Resolution(smallest=160, grows_from=65, full_from=76))
    assert [image_size_at(phase, 192, epoch) for epoch in range(88)] == [160] * 71 + [192] * 17


def test_a_phase_without_resizing_has_full_images() -> None:
    assert {image_size_at(Phase(epochs=3, lr=0.1), 28, epoch) for epoch in range(3)} == {28}


@given(st.integers(1, 99), st.integers(1, 500), st.data())
def test_gradual_sparsity_follows_the_cubic_of_zhu_and_gupta(percent: int, updates: int, data: st.DataObject) -> None:
    """s_t = s_f + (s_i - s_f) (1 - (t - t_0) / (n dt))^3 with s_i = 0."""
    keep, final = Decimal(percent) / 100, 1 - percent / 100
    number = data.draw(st.integers(0, updates))
    sparsity = 1 - kept_fraction_at(keep, Fraction(number, updates))
    assert float(sparsity) == pytest.approx(final + (0 - final) * (1 - number / updates) ** 3, abs=1e-12)
    assert kept_fraction_at(keep, Fraction(0)) == 1
    assert kept_fraction_at(keep, Fraction(1)) == keep, "exactly"


def test_flying_bird_exchanges_half_at_first_and_little_in_the_end() -> None:
    assert [drop_fraction_at(elapsed) for elapsed in (0, 0.5, 1)] == pytest.approx([0.5, 0.2525, 0.005])
