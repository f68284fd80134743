"""Wilson and Clopper-Pearson intervals against scipy, McNemar's p against enumeration of all outcomes."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.evaluation.statistics import certified_curve, clopper_pearson_lower, mcnemar, wilson_interval


@given(st.integers(1, 60_000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))), st.sampled_from([0.9, 0.95]))
def test_wilson_is_scipys(counts: tuple[int, int], confidence: float) -> None:
    correct, total = counts
    low, high = wilson_interval(correct, total, confidence)
    expected = scipy.stats.binomtest(correct, total).proportion_ci(confidence_level=confidence, method="wilson")
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert 0 <= low <= correct / total <= high <= 1


def test_wilson_of_a_known_example() -> None:
    # 8 of 10 at 95 %: 0.4902 to 0.9433, as tabulated.
    assert wilson_interval(8, 10) == pytest.approx((0.4902, 0.9433), abs=5e-5)


@pytest.mark.parametrize(("correct", "total"), [(0, 0), (-1, 5), (6, 5)])
def test_wilson_refuses_invalid_counts(correct: int, total: int) -> None:
    with pytest.raises(ValueError, match=f"{correct} correct of {total}"):
        wilson_interval(correct, total)


@pytest.mark.parametrize("confidence", [0.0, 1.0, 95.0])
def test_wilson_refuses_a_confidence_in_percent(confidence: float) -> None:
    with pytest.raises(ValueError, match=r"for example 0\.95"):
        wilson_interval(1, 2, confidence)


counts = st.integers(1, 100_000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))
alphas = st.sampled_from([0.001, 0.01, 0.05, 0.5])


@given(counts, alphas)
def test_clopper_pearson_is_scipys_exact_interval(count: tuple[int, int], alpha: float) -> None:
    successes, trials = count
    test = scipy.stats.binomtest(successes, trials, alternative="greater")
    expected = test.proportion_ci(confidence_level=1 - alpha, method="exact").low
    assert clopper_pearson_lower(successes, trials, alpha) == pytest.approx(expected, rel=1e-7, abs=1e-12)


@settings(max_examples=40)
@given(st.integers(1, 200), alphas, st.floats(0.001, 0.999))
def test_clopper_pearson_exceeds_the_truth_with_probability_at_most_alpha(n: int, alpha: float, p: float) -> None:
    """Summed over every possible outcome, not sampled."""
    too_high = np.array([clopper_pearson_lower(k, n, alpha) > p for k in range(n + 1)])
    assert float(scipy.stats.binom.pmf(np.arange(n + 1), n, p)[too_high].sum()) <= alpha + 1e-9


def test_clopper_pearson_at_the_extremes() -> None:
    assert clopper_pearson_lower(0, 50, 0.001) == 0.0
    assert clopper_pearson_lower(50, 50, 0.001) == pytest.approx(0.001 ** (1 / 50), rel=1e-12)


@pytest.mark.parametrize(("successes", "trials", "alpha"), [(0, 0, 0.1), (6, 5, 0.1), (1, 5, 0.0), (1, 5, 1.0)])
def test_clopper_pearson_refuses_invalid_counts(successes: int, trials: int, alpha: float) -> None:
    with pytest.raises(ValueError, match=r"is not a count|alpha .* for example 0\.001"):
        clopper_pearson_lower(successes, trials, alpha)


def brute_force_p(first: int, second: int) -> float:
    """Under the null hypothesis discordant images are fair coin flips: sum all outcomes no likelier than this one."""
    n = first + second
    weights = [math.comb(n, k) for k in range(n + 1)]
    return float(sum(Fraction(w, 2**n) for w in weights if w <= weights[first]))


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=80))
def test_mcnemar_equals_brute_force(verdicts: list[tuple[bool, bool]]) -> None:
    first, second = (np.array(column, dtype=np.bool_) for column in zip(*verdicts, strict=True))
    test = mcnemar(first, second)
    only_first = sum(a and not b for a, b in verdicts)
    only_second = sum(b and not a for a, b in verdicts)
    assert (test.only_first, test.only_second) == (only_first, only_second)
    assert test.p_value == pytest.approx(brute_force_p(only_first, only_second), rel=1e-9)
    assert test.difference == pytest.approx(first.mean() - second.mean(), abs=1e-12)
    assert mcnemar(second, first).p_value == pytest.approx(test.p_value, rel=1e-9)


def test_mcnemar_of_a_known_example() -> None:
    # 9 against 1: 2 * (1 + 10) / 2**10
    first = np.array([True] * 9 + [False] + [True] * 40)
    second = np.array([False] * 9 + [True] + [True] * 40)
    assert mcnemar(first, second).p_value == pytest.approx(22 / 1024)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (np.ones(3, dtype=np.bool_), np.ones(4, dtype=np.bool_)),
        (np.ones(3, dtype=np.int64), np.ones(3, dtype=np.bool_)),
        (np.ones((3, 1), dtype=np.bool_), np.ones((3, 1), dtype=np.bool_)),
        (np.ones(0, dtype=np.bool_), np.ones(0, dtype=np.bool_)),
    ],
)
def test_mcnemar_refuses_arrays_that_are_not_paired_verdicts(first: np.ndarray, second: np.ndarray) -> None:
    with pytest.raises(ValueError, match="_correct"):
        mcnemar(first, second)


def test_the_certified_curve_falls_from_the_smoothed_accuracy_to_zero() -> None:
    """Certified for the closed ball; the radius of a certificate is that of the open ball."""
    correct, radius = np.array([True, True, False, False, True]), np.array([0.1, 0.25, 0.0, 0.9, 0.4])
    curve = certified_curve(correct, radius, [0.0, 0.2, 0.249, 0.25, 0.5])
    assert [point["radius"] for point in curve] == [0.0, 0.2, 0.249, 0.25, 0.5]
    counts = [3, 2, 2, 1, 0]
    assert [point["value"] for point in curve] == [count / 5 for count in counts]
    assert [(point["low"], point["high"]) for point in curve] == [wilson_interval(count, 5) for count in counts]
