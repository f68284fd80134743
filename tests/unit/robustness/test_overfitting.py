"""Catastrophic overfitting: detection from counts, stronger attacks, and the probe at the current training eps."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import binom
from torch import Tensor, nn

from pipeline.evaluation.measures.overfitting_probe import WithOverfittingProbe
from pipeline.evaluation.measures.pgd import Pgd
from pipeline.recipe.objective import ThreatModel
from pipeline.robustness.overfitting import SIGNIFICANCE, STRONGEST, CatastrophicOverfitting, overfits, stronger

counts = st.integers(0, 2000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))


@given(right=counts, smallest=st.floats(0.05, 1))
@example(right=(0, 0), smallest=0.5)
@example(right=(1, 3), smallest=0.5)
@example(right=(14, 49), smallest=0.5)
@example(right=(0, 1), smallest=0.8125)
def test_it_is_detected_when_chance_cannot_explain_the_ratio(right: tuple[int, int], smallest: float) -> None:
    """Against the exact binomial probability of so few among those robust to one step."""
    pgd, one_step = right
    probability = float(binom.cdf(pgd, one_step, smallest))
    assume(abs(probability - SIGNIFICANCE) > 1e-9)
    assert overfits(pgd, one_step, smallest) == (pgd < smallest * one_step and probability < SIGNIFICANCE)


@pytest.mark.parametrize(
    ("right", "smallest", "expected"),
    [
        ((0, 700), 0.5, True),
        ((250, 700), 0.5, True),
        ((340, 700), 0.5, False),
        ((600, 700), 0.5, False),
        ((699, 700), 1.0, True),
        ((700, 700), 1.0, False),
        ((0, 3), 0.5, False),
        ((0, 0), 0.5, False),
        ((300, 200), 0.5, False),
    ],
)
def test_whole_numbers(right: tuple[int, int], smallest: float, expected: bool) -> None:
    assert overfits(*right, smallest) == expected


@pytest.mark.parametrize(
    ("level", "eps", "step_size", "expected"),
    [
        (1, 0.1, 0.125, (2, 0.125)),
        (1, 0.1, 0.2, (2, 0.125)),
        (2, 0.1, 0.125, (4, 0.0625)),
        (3, 0.1, 0.125, (8, 0.03125)),
        (4, 0.1, 0.125, (16, 0.015625)),
        (4, 0.1, 0.01, (16, 0.01)),
        (2, 0.0, 0.0, (4, 0.0)),
    ],
)
def test_each_level_doubles_the_steps(level: int, eps: float, step_size: float, expected: tuple[int, float]) -> None:
    steps, size = stronger(level, eps, step_size)
    assert (steps, size) == (expected[0], pytest.approx(expected[1]))
    assert level == STRONGEST or stronger(level + 1, eps, step_size)[0] == 2 * steps


def test_the_error_reports_the_counts() -> None:
    error = CatastrophicOverfitting("pretrain", 60, 0, 40, (15, 51))
    assert str(error) == (
        "pretrain: catastrophic overfitting at step 60: of the held-out images, 15 are robust to PGD and 51 to one step"
    )
    assert (error.step, error.level, error.good_step) == (60, 0, 40)


class Cosine(nn.Module):
    """Two classes whose margin oscillates within eps: one long step overshoots the minimum that short steps reach."""

    def forward(self, images: Tensor) -> Tensor:
        margin = torch.cos(images.flatten(1).mean(dim=1) * 100)
        return torch.stack([torch.zeros_like(margin), margin], dim=1)


class Fixed:
    """A measure with fixed verdicts."""

    name, title, settings = "fixed", "fixed", {"norm": None}

    def verdicts(self, network: nn.Module, x: Tensor, y: Tensor, ids: NDArray[np.int64]) -> dict[str, Tensor]:
        return {
            "clean_correct": torch.ones(len(x), dtype=torch.bool),
            "robust_correct": torch.ones(len(x), dtype=torch.bool),
        }


def probe_columns(measure: Any, pgd: Pgd) -> dict[str, Tensor]:
    x = torch.full((64, 3, 4, 4), 0.5) + torch.linspace(-0.2, 0.2, 64).view(-1, 1, 1, 1)
    network = Cosine()
    y = network(x).argmax(dim=1)
    return WithOverfittingProbe(measure, pgd).verdicts(network, x, y, np.arange(64))


def test_the_probe_distinguishes_one_step_and_multi_step_attacks() -> None:
    threat_model = ThreatModel(norm="linf", eps=Fraction(1, 10))
    pgd = Pgd(threat_model, 20, 0.0125, restarts=1, seed=0)
    columns = probe_columns(pgd, pgd)
    assert torch.equal(columns["pgd_correct"], columns["robust_correct"])
    one_step = replace(pgd, steps=1, step_size=0.1)
    alone = probe_columns(one_step, pgd)
    assert torch.equal(columns["one_step_correct"], alone["robust_correct"])
    assert torch.equal(columns["pgd_correct"], alone["pgd_correct"])
    assert int(columns["pgd_correct"].sum()) < int(columns["one_step_correct"].sum())


def test_the_probe_has_its_own_eps_with_any_measure() -> None:
    """During warmup, the row's verdicts are at full eps and the probe's at the current eps."""
    full_eps = Pgd(ThreatModel(norm="linf", eps=Fraction(1, 10)), 20, 0.0125, restarts=1, seed=0)
    threat_model = ThreatModel(norm="linf", eps=Fraction(1, 10000))
    columns = probe_columns(full_eps, Pgd(threat_model, 20, 0.0000125, restarts=1, seed=0))
    assert int(columns["pgd_correct"].sum()) > int(columns["robust_correct"].sum())
    assert "pgd_correct" in probe_columns(Fixed(), full_eps)
