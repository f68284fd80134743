"""Intervals and tests for counts of correct images: exact counts in, numbers equal to those of scipy.stats out.

That itself takes a second to import, in every process of a run; scipy.special, which it rests on, does not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import bdtr, betaincinv, ndtri


def wilson_interval(correct: int, total: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a proportion (Wilson, JASA 1927), without continuity correction.

    Returns (low, high), fractions in [0, 1]. Errors: ValueError unless 0 <= correct <= total, total > 0 and
    0 < confidence < 1.
    """
    if total <= 0 or not 0 <= correct <= total:
        raise ValueError(f"{correct} correct of {total} images is no proportion; give 0 <= correct <= total, total > 0")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence {confidence} must lie between 0 and 1, for example 0.95")
    z, share = float(ndtri((1 + confidence) / 2)), correct / total
    middle = (share + z**2 / (2 * total)) / (1 + z**2 / total)
    half = z * math.sqrt(share * (1 - share) / total + (z / (2 * total)) ** 2) / (1 + z**2 / total)
    # Where rounding would leave a hair beyond the end.
    low = 0.0 if correct == 0 else max(middle - half, 0.0)
    high = 1.0 if correct == total else min(middle + half, 1.0)
    return low, high


def clopper_pearson_lower(successes: int, trials: int, alpha: float) -> float:
    """Clopper and Pearson's one-sided lower bound of a probability (Biometrika 1934), exact for the binomial.

    At most alpha of all experiments give a bound above the true probability. Errors: ValueError unless
    0 <= successes <= trials, trials > 0 and 0 < alpha < 1.
    """
    if trials <= 0 or not 0 <= successes <= trials:
        raise ValueError(f"{successes} of {trials} is no count of successes; give 0 <= successes <= trials, trials > 0")
    if not 0 < alpha < 1:
        raise ValueError(f"alpha {alpha} must lie between 0 and 1, for example 0.001")
    return float(betaincinv(successes, trials - successes + 1, alpha)) if successes else 0.0


def certified_curve(
    correct: NDArray[np.bool_], radius: NDArray[np.float64], radii: Sequence[float]
) -> list[dict[str, float]]:
    """Certified accuracy against radius (Cohen et al., ICML 2019, section 4): the share of images that are right,
    provably so for every perturbation of l2 norm <= radius.

    `correct` and `radius`: what was found for each image, shape [n]; a radius is that of the open ball. Returns one
    point per asked radius: radius, value, and its 95 % Wilson interval low, high.
    """
    points = []
    for asked in radii:
        count = int(np.count_nonzero(correct & (radius > asked)))
        low, high = wilson_interval(count, correct.size)
        points.append({"radius": float(asked), "value": count / correct.size, "low": low, "high": high})
    return points


@dataclass(frozen=True)
class McNemar:
    """Two classifiers on the same images: what tells them apart, and how surely."""

    only_first: int
    """Images that only the first one gets right."""
    only_second: int
    p_value: float
    """Two-sided exact binomial p of the discordant images, 1.0 if there are none."""
    difference: float
    """Accuracy of the first minus accuracy of the second, a fraction of all images in [-1, 1]."""


def mcnemar(first_correct: NDArray[np.bool_], second_correct: NDArray[np.bool_]) -> McNemar:
    """McNemar's test (Psychometrika 1947), exact: only images on which the two disagree carry evidence.

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
    # The binomial of a fair coin is symmetric: both tails are as likely. They overlap where the counts are equal.
    p_value = min(1.0, 2 * float(bdtr(min(only_first, only_second), discordant, 0.5)))
    return McNemar(only_first, only_second, p_value, (only_first - only_second) / first_correct.size)


def paired_interval(only_first: int, only_second: int, total: int, confidence: float = 0.95) -> tuple[float, float]:
    """Interval of the difference between two accuracies on the same images (Bonett and Price, J. Educ. Behav. Stat.
    2012: Wald's, with one discordant image added on either side).

    `only_first` and `only_second` of `total` images are right for that one alone. Returns (low, high), fractions in
    [-1, 1]. Errors: ValueError for counts that are none.
    """
    if min(only_first, only_second) < 0 or total <= 0 or only_first + only_second > total:
        raise ValueError(f"{only_first} and {only_second} of {total} images are no counts of discordant images")
    first, second = (only_first + 1) / (total + 2), (only_second + 1) / (total + 2)
    middle = first - second
    half = float(ndtri((1 + confidence) / 2)) * math.sqrt((first + second - middle**2) / (total + 2))
    return max(middle - half, -1.0), min(middle + half, 1.0)
