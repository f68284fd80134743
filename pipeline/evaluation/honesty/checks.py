"""Honesty checks: whether a robust accuracy shows symptoms of gradient masking or of a weak attack.

Each check compares one statistic of the columns of `pipeline.evaluation.honesty.probes` with a threshold (Carlini et
al., "On Evaluating Adversarial Robustness", 2019, section 5, lists the symptoms; they include AutoAttack's flags). The
sample is small, so the thresholds allow for chance:

- Counts. A check has a tolerance t, the fraction of images that may fail it on a sound network. It warns if k failures
  among n images are significantly more: P(Binomial(n, t) >= k) < LEVEL = 0.01. For n = 60 that is k = 4 at t = 0.01,
  5 at 0.02, 8 at 0.05 and 13 at 0.1; for n = 100 it is 5, 7, 12 and 19.
- Attacks are compared in pairs: another attack runs only on the n images that PGD does not break, and breaks k of them.
- The curve is compared in pairs, too (exact one-sided McNemar test): it rises from one radius to the next if k images
  are correct only at the larger radius, m only at the smaller, and P(Binomial(k + m, 1/2) >= k) < CURVE_LEVEL = 0.001,
  a tenth of LEVEL because there are six comparisons. For m = 0 that is k = 10.

Passing every check is no proof: a stronger attack may still lower the accuracy.
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
"""Significance level: the largest false-alarm rate of a check whose true failure rate is its tolerance."""
CURVE_LEVEL = 0.001
SAME_LOGITS = 1e-4
"""Largest difference of a logit, relative to the image's largest logit, that counts as rounding error."""
Column = NDArray[np.bool_]


def exceeds(count: int, total: int, tolerance: float) -> bool:
    """Whether `count` of `total` is significantly more than a fraction `tolerance`, at LEVEL."""
    return bool(bdtrc(count - 1, total, tolerance) < LEVEL)


def rises(smaller: Column, larger: Column) -> bool:
    """Whether accuracy is significantly higher at the larger radius, at CURVE_LEVEL; bool [n] each."""
    gained, lost = int((larger & ~smaller).sum()), int((smaller & ~larger).sum())
    return bool(bdtrc(gained - 1, gained + lost, 0.5) < CURVE_LEVEL)


def build_check(name: str, warns: bool, figure: str, meaning: str) -> Check:
    return Check(name=name, status="warn" if warns else "pass", figure=figure, meaning=meaning)


@dataclass(frozen=True)
class _Rival:
    """An attack that runs on the images that PGD does not break."""

    name: str
    column: str
    tolerance: float
    attack: str
    """Follows "broken by" in the figure."""
    meaning: str


RIVALS = (
    _Rival(
        "more steps",
        "withstands_longer",
        0.05,
        f"PGD with {LONGER} times as many steps",
        "PGD has not converged, so the robust accuracy is overestimated; raise evaluation.steps or "
        "evaluation.step_size.",
    ),
    _Rival(
        "one step",
        "withstands_one_step",
        0.02,
        "a single step",
        "One step breaks images that PGD does not, a sign of gradient masking: the robust accuracy is overestimated; "
        "attack the network without the component that distorts the gradient.",
    ),
    _Rival(
        "another loss",
        "withstands_margin",
        0.1,
        "PGD on the margin of logits",
        "PGD on cross-entropy is too weak, usually because large logits saturate the loss; report AutoAttack or PGD on "
        "the margin instead.",
    ),
    _Rival(
        "black box",
        "withstands_square",
        0.02,
        f"Square with {QUERIES} queries, without gradients",
        "A gradient-free attack breaks images that PGD does not: gradients are masked, and the robust accuracy is "
        "overestimated; rely on black-box and adaptive attacks only.",
    ),
)


def build_checks(verdicts: Verdicts) -> list[Check]:
    """One check per property that the columns of `probes.Probes` measure, in the order of docs/guide.md.

    Square is absent for images too small for it, the exported file if there was no network to compare it with.
    """
    rivals = [_against(verdicts, rival) for rival in RIVALS if rival.column in verdicts]
    checks = [_curve(verdicts), *rivals, _dead(verdicts), _slope(verdicts), _repeats(verdicts), _logits(verdicts)]
    return [*checks, _twins(verdicts)] if "twin_gap" in verdicts else checks


def _curve(verdicts: Verdicts) -> Check:
    curve = {name.removeprefix(RADIUS): right for name, right in verdicts.items() if name.startswith(RADIUS)}
    columns = list(curve.values())
    right, left = int(columns[0].sum()), int(columns[-1].sum())
    climbs = any(rises(smaller, larger) for smaller, larger in pairwise(columns))
    *inner, last = (f"{100 * column.mean():.3g} % at {label}" for label, column in curve.items())
    return build_check(
        "larger eps",
        climbs or exceeds(left, right, 0.01),
        f"robust accuracy: {', '.join(inner)} x eps; {last}",
        "Robust accuracy must fall as eps grows and reach 0 once every image may become uniform grey. It does not, so "
        "the attack fails for reasons other than robustness, and the robust accuracy is meaningless.",
    )


def _against(verdicts: Verdicts, rival: _Rival) -> Check:
    standing = verdicts["robust_correct"]
    broken, total = int((standing & ~verdicts[rival.column]).sum()), int(standing.sum())
    figure = f"{broken} of the {total} images robust to PGD are broken by {rival.attack}"
    return build_check(rival.name, exceeds(broken, total, rival.tolerance), figure, rival.meaning)


def _dead(verdicts: Verdicts) -> Check:
    count, total = int(verdicts["dead_gradient"].sum()), len(verdicts["dead_gradient"])
    return build_check(
        "gradient",
        exceeds(count, total, 0.02),
        f"zero or not finite for {count} of {total} images",
        "PGD cannot move without a gradient, so the robust accuracy is overestimated; check the network for saturated "
        "logits, rounding or thresholds, and attack it without them.",
    )


def _slope(verdicts: Verdicts) -> Check:
    wrong, total = int((~verdicts["follows_gradient"]).sum()), len(verdicts["follows_gradient"])
    return build_check(
        "slope",
        exceeds(wrong, total, 0.1),
        f"over {SLOPE:g} eps the margin does not follow its gradient for {wrong} of {total} images",
        "The gradient does not predict how the margin changes (rounding, thresholds, ripples, noise), so PGD is misled "
        "and the robust accuracy is overestimated; attack a smooth approximation of that component (BPDA).",
    )


def _repeats(verdicts: Verdicts) -> Check:
    gap = _largest(verdicts["repeat_gap"])
    return build_check(
        "repeatable",
        not gap <= SAME_LOGITS,
        f"logits of two passes over the same images differ by {gap:.1e} of the largest",
        "The network is randomised or changes between forward passes, so a single gradient is unreliable; attack and "
        "evaluate the expectation over many passes (EOT), or make the network deterministic.",
    )


def _logits(verdicts: Verdicts) -> Check:
    count, total = int(verdicts["probabilities"].sum()), len(verdicts["probabilities"])
    return build_check(
        "logits",
        count == total,
        f"outputs are probabilities for {count} of {total} images",
        "The network ends in a softmax, and cross-entropy applies another one, which flattens the gradient; remove it.",
    )


def _twins(verdicts: Verdicts) -> Check:
    gap = _largest(verdicts["twin_gap"])
    return build_check(
        "exported file",
        not gap <= SAME_LOGITS,
        f"its logits differ from the trained network's by {gap:.1e} of the largest, clean and in the ball",
        "model.safetensors is not the network that was trained (weights, mask or normalisation differ), so its "
        "accuracies do not describe that network; delete it together with result.json and resume.",
    )


def _largest(gaps: NDArray[np.floating]) -> float:
    """NaN if any gap is NaN."""
    return float(np.max(gaps))
