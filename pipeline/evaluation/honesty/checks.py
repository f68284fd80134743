"""Whether a robust accuracy can be believed: checks that a network passes if PGD could see what it does.

Each check is one number with a threshold, from the columns of `pipeline.evaluation.honesty.probes` (Carlini et al., "On
evaluating adversarial robustness", 2019, section 5, lists the symptoms; AutoAttack's flags are among them). Images are
few, so thresholds leave room for chance:

- Counts. A check has a tolerance t, the share of images that a sound network may have against it. It warns if the count
  k of n is more than t explains: P(Binomial(n, t) >= k) < LEVEL = 0.01. Of 60 images that is k = 4 with t = 0.01,
  5 with 0.02, 8 with 0.05 and 13 with 0.1; of 100 it is 5, 7, 12 and 19.
- Attacks are compared in pairs: another attack only gets the images that PGD does not break, so n is their number and k
  those that it breaks.
- The curve is compared in pairs, too (McNemar, one-sided, exact): it rises from one radius to the next if k images are
  right only at the larger one and m only at the smaller, and P(Binomial(k + m, 1/2) >= k) < CURVE_LEVEL = 0.001, a
  tenth of LEVEL as there are six comparisons. With m = 0 that is k = 10.

An accuracy that passes may be wrong still, by an attack that nobody tried.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from scipy.special import bdtrc

from pipeline.evaluation.honesty.probes import LONGER, QUERIES, RADIUS, SLOPE
from pipeline.evaluation.measures.base import Verdicts
from pipeline.evaluation.result import Check

LEVEL = 0.01
"""How often, at most, a check warns of a network whose rate is its tolerance."""
CURVE_LEVEL = 0.001
SAME_LOGITS = 1e-4
"""Largest difference of a logit, in units of the image's largest, that is taken for rounding."""
Column = NDArray[np.bool_]


def exceeds(count: int, total: int, tolerance: float) -> bool:
    """Whether `count` of `total` is more than a share of `tolerance` explains, at LEVEL."""
    return bool(bdtrc(count - 1, total, tolerance) < LEVEL)


def rises(smaller: Column, larger: Column) -> bool:
    """Whether images are right at a larger radius more often than at a smaller one, at CURVE_LEVEL; bool [n] each."""
    gained, lost = int((larger & ~smaller).sum()), int((smaller & ~larger).sum())
    return bool(bdtrc(gained - 1, gained + lost, 0.5) < CURVE_LEVEL)


def build_check(name: str, warns: bool, figure: str, meaning: str) -> Check:
    return Check(name=name, status="warn" if warns else "pass", figure=figure, meaning=meaning)


@dataclass(frozen=True)
class _Rival:
    """An attack on the images that PGD does not break."""

    name: str
    column: str
    tolerance: float
    attack: str
    """In the figure, after "broken by"."""
    meaning: str


RIVALS = (
    _Rival(
        "more steps",
        "withstands_longer",
        0.05,
        f"PGD of {LONGER} times as many steps",
        "PGD has not converged, so the robust accuracy is too high; raise evaluation.steps or evaluation.step_size.",
    ),
    _Rival(
        "one step",
        "withstands_one_step",
        0.02,
        "a single step",
        "The gradient leads only while it is followed in one step, so PGD gets lost and the robust accuracy is too "
        "high; attack without the part of the network that bends the gradient.",
    ),
    _Rival(
        "another loss",
        "withstands_margin",
        0.1,
        "PGD on the margin of logits",
        "Cross-entropy leads PGD astray, mostly because logits are so large that it saturates; believe AutoAttack, or "
        "PGD on the margin.",
    ),
    _Rival(
        "black box",
        "withstands_square",
        0.02,
        f"Square of {QUERIES} queries, without gradients",
        "An attack that sees no gradient finds what PGD does not: gradients are masked, and the robust accuracy is too "
        "high; believe black-box attacks and adaptive ones only.",
    ),
)


def build_checks(verdicts: Verdicts) -> list[Check]:
    """One check per property that the columns of `probes.Probes` measure, in the order of docs/guide.md.

    Square is absent for images that are too small for it, and the exported file where nothing was compared with it.
    """
    rivals = [_against(verdicts, rival) for rival in RIVALS if rival.column in verdicts]
    found = [_curve(verdicts), *rivals, _dead(verdicts), _slope(verdicts), _repeats(verdicts), _logits(verdicts)]
    return [*found, _twins(verdicts)] if "twin_gap" in verdicts else found


def _curve(verdicts: Verdicts) -> Check:
    curve = {name.removeprefix(RADIUS): right for name, right in verdicts.items() if name.startswith(RADIUS)}
    columns = list(curve.values())
    right, left = int(columns[0].sum()), int(columns[-1].sum())
    climbs = any(rises(smaller, larger) for smaller, larger in pairwise(columns))
    *inner, last = (f"{100 * column.mean():.3g} % at {label}" for label, column in curve.items())
    return build_check(
        "larger eps",
        climbs or exceeds(left, right, 0.01),
        f"robust: {', '.join(inner)} x eps; {last}",
        "Robust accuracy must fall as eps grows, and reach 0 where every image may become grey; as it does not, the "
        "attack fails for another reason than the network's robustness, and its robust accuracy says nothing.",
    )


def _against(verdicts: Verdicts, rival: _Rival) -> Check:
    standing = verdicts["robust_correct"]
    broken, total = int((standing & ~verdicts[rival.column]).sum()), int(standing.sum())
    figure = f"{broken} of the {total} images that withstand PGD broken by {rival.attack}"
    return build_check(rival.name, exceeds(broken, total, rival.tolerance), figure, rival.meaning)


def _dead(verdicts: Verdicts) -> Check:
    count, total = int(verdicts["dead_gradient"].sum()), len(verdicts["dead_gradient"])
    return build_check(
        "gradient",
        exceeds(count, total, 0.02),
        f"zero or not finite for {count} of {total} images",
        "PGD stands still where the loss has no gradient, so the robust accuracy is too high; look for saturated "
        "logits, rounding or thresholds in the network, and attack without them.",
    )


def _slope(verdicts: Verdicts) -> Check:
    wrong, total = int((~verdicts["follows_gradient"]).sum()), len(verdicts["follows_gradient"])
    return build_check(
        "slope",
        exceeds(wrong, total, 0.1),
        f"the margin does not change as its gradient says over {SLOPE:g} eps for {wrong} of {total} images",
        "The gradient is not the slope of what it is the gradient of (rounding, thresholds, ripples, noise), so PGD is "
        "misled and the robust accuracy is too high; attack a smooth stand-in of that part of the network.",
    )


def _repeats(verdicts: Verdicts) -> Check:
    gap = _largest(verdicts["repeat_gap"])
    return build_check(
        "repeatable",
        not gap <= SAME_LOGITS,
        f"logits of the same images differ by {gap:.1e} of the largest",
        "The network is random, or changes as it is asked, so one gradient says little of the next forward; average "
        "gradients over many forwards (EOT) and judge by the average, or make it deterministic.",
    )


def _logits(verdicts: Verdicts) -> Check:
    count, total = int(verdicts["probabilities"].sum()), len(verdicts["probabilities"])
    return build_check(
        "logits",
        count == total,
        f"probabilities for {count} of {total} images",
        "The network ends in a softmax, and cross-entropy takes another one, which flattens the gradient; remove it.",
    )


def _twins(verdicts: Verdicts) -> Check:
    gap = _largest(verdicts["twin_gap"])
    return build_check(
        "exported file",
        not gap <= SAME_LOGITS,
        f"its logits differ from the live network's by {gap:.1e} of the largest, on images and in the ball",
        "model.safetensors is another network than the one that was trained (weights, mask or normalisation), so its "
        "accuracies are not those of the training; remove it together with result.json and resume.",
    )


def _largest(gaps: NDArray[np.floating]) -> float:
    """NaN if one is."""
    return float(np.max(gaps))
