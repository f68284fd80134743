"""Intervals and tests for counts of correct images; results equal those of scipy.stats.

Only scipy.special is imported: scipy.stats takes a second to import, in every process of a run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import bdtr, betaincinv, ndtri


def wilson_interval(correct: int, total: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson score interval of a proportion (Wilson, JASA 1927), without continuity correction.

    Returns (low, high), fractions in [0, 1]. Errors: ValueError unless 0 <= correct <= total, total > 0 and
    0 < confidence < 1.
    """
    if total <= 0 or not 0 <= correct <= total:
        raise ValueError(
            f"{correct} correct of {total} images is not a proportion; give 0 <= correct <= total, total > 0"
        )
    if not 0 < confidence < 1:
        raise ValueError(f"confidence {confidence} must lie between 0 and 1, for example 0.95")
    z, share = float(ndtri((1 + confidence) / 2)), correct / total
    middle = (share + z**2 / (2 * total)) / (1 + z**2 / total)
    half = z * math.sqrt(share * (1 - share) / total + (z / (2 * total)) ** 2) / (1 + z**2 / total)
    # Exact at the ends, despite rounding.
    low = 0.0 if correct == 0 else max(middle - half, 0.0)
    high = 1.0 if correct == total else min(middle + half, 1.0)
    return low, high


def clopper_pearson_lower(successes: int, trials: int, alpha: float) -> float:
    """One-sided Clopper-Pearson lower bound on a probability (Biometrika 1934), exact for the binomial.

    The bound exceeds the true probability with probability at most alpha. Errors: ValueError unless
    0 <= successes <= trials, trials > 0 and 0 < alpha < 1.
    """
    if trials <= 0 or not 0 <= successes <= trials:
        raise ValueError(
            f"{successes} of {trials} is not a count of successes; give 0 <= successes <= trials, trials > 0"
        )
    if not 0 < alpha < 1:
        raise ValueError(f"alpha {alpha} must lie between 0 and 1, for example 0.001")
    return float(betaincinv(successes, trials - successes + 1, alpha)) if successes else 0.0


def certified_curve(
    correct: NDArray[np.bool_], radius: NDArray[np.float64], radii: Sequence[float]
) -> list[dict[str, float]]:
    """Certified accuracy against radius (Cohen et al., ICML 2019, section 4): the fraction of images that are
    certified correct for every perturbation of l2 norm <= radius.

    `correct` and `radius`, shape [n] each, are per image; a radius is that of the open ball. Returns one point per
    entry of `radii`: radius, value, and the bounds low and high of its 95 % Wilson interval.
    """
    points = []
    for at_radius in radii:
        count = int(np.count_nonzero(correct & (radius > at_radius)))
        low, high = wilson_interval(count, correct.size)
        points.append({"radius": float(at_radius), "value": count / correct.size, "low": low, "high": high})
    return points


@dataclass(frozen=True)
class McNemar:
    """McNemar's test of two classifiers on the same images."""

    only_first: int
    """Number of images that only the first classifies correctly."""
    only_second: int
    p_value: float
    """Exact two-sided binomial p-value of the discordant images, 1.0 if there are none."""
    difference: float
    """Accuracy of the first minus accuracy of the second, in [-1, 1]."""


def mcnemar(first_correct: NDArray[np.bool_], second_correct: NDArray[np.bool_]) -> McNemar:
    """McNemar's exact test (Psychometrika 1947): only images on which the two disagree carry evidence.

    Both arguments: bool, shape [n], the same image at the same index. Errors: ValueError for any other shape or dtype.
    """
    for name, verdicts in (("first_correct", first_correct), ("second_correct", second_correct)):
        if verdicts.dtype != np.bool_ or verdicts.ndim != 1 or verdicts.size == 0:
            raise ValueError(
                f"{name} is {verdicts.dtype} of shape {verdicts.shape}; give a bool array of shape [n], n > 0"
            )
    if first_correct.shape != second_correct.shape:
        raise ValueError(
            f"first_correct has {first_correct.size} images and second_correct {second_correct.size}; "
            "evaluate both networks on the same images"
        )
    only_first = int(np.count_nonzero(first_correct & ~second_correct))
    only_second = int(np.count_nonzero(~first_correct & second_correct))
    discordant = only_first + only_second
    # Both tails of a fair binomial are equally likely; they overlap where the counts are equal.
    p_value = min(1.0, 2 * float(bdtr(min(only_first, only_second), discordant, 0.5)))
    return McNemar(only_first, only_second, p_value, (only_first - only_second) / first_correct.size)


def paired_interval(only_first: int, only_second: int, total: int, confidence: float = 0.95) -> tuple[float, float]:
    """Interval of the difference between two accuracies on the same images (Bonett and Price, J. Educ. Behav. Stat.
    2012: Wald interval with one discordant image added on either side).

    `only_first` and `only_second` of `total` images are correct for that classifier alone. Returns (low, high),
    fractions in [-1, 1]. Errors: ValueError for counts that do not fit `total`.
    """
    if min(only_first, only_second) < 0 or total <= 0 or only_first + only_second > total:
        raise ValueError(f"{only_first} and {only_second} of {total} images are not counts of discordant images")
    first, second = (only_first + 1) / (total + 2), (only_second + 1) / (total + 2)
    middle = first - second
    half = float(ndtri((1 + confidence) / 2)) * math.sqrt((first + second - middle**2) / (total + 2))
    return max(middle - half, -1.0), min(middle + half, 1.0)
