"""Measurements per image for the honesty checks: other attacks on images that PGD does not break, and gradient quality.

`Probes` is a measure, so verdicts do not depend on workers or interruptions: all random numbers are keyed by sample id,
those of Square by chunk. `pipeline.evaluation.honesty.checks` interprets the columns. Computed in fp32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pyautoattack.square import SquareAttack
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.evaluation.measures.base import ranked
from pipeline.evaluation.measures.pgd import Pgd
from pipeline.recipe.objective import ThreatModel
from pipeline.rng import scope_key
from pipeline.robustness.attacks import Ball, L2Ball, LinfBall, ball_of, pgd
from pipeline.robustness.noise import device_keys

MULTIPLES = (Fraction(1, 4), Fraction(1, 2), Fraction(1), Fraction(2), Fraction(4))
"""Radii of the curve, in units of eps; 0 and a radius at which no image can be robust are added."""
CURVE_STEPS = 8
LONGER = 3
"""Factor on PGD's steps for the longer attack."""
QUERIES = 100
"""Square's query budget per image."""
SMALLEST_SIDE_L2 = 25
"""In pixels: l2 Square tiles an image with squares of a fifth of its side, which do not fit into smaller images."""
SLOPE = 0.1
"""Half-width of the central difference, in units of eps: about one PGD step."""
AGREEMENT = 0.5
"""Largest relative difference between the predicted and the measured change of the margin."""
ROUNDING = 1e-5
"""Relative to the largest logit: a difference between two logits below fp32's resolution."""

RADIUS = "at "
"""Prefix of the curve's columns: whether the image is classified correctly at this radius."""


def radii(threat_model: ThreatModel, shape: torch.Size) -> dict[str, float]:
    """Label -> radius, increasing, without 0, for images of `shape`.

    At the last radius every image may become the same uniform grey, so a working attack breaks all of them. PGD may get
    stuck that far out, where ReLUs are dead, so it has six starts there: of 276 images, 11 stay unbroken after one
    start, 5 after three and 3 after six, for a small network 99 % pruned by magnitude.
    """
    linf = threat_model.norm == "linf"
    grey = 0.5 if linf else 0.5 * math.sqrt(math.prod(shape))
    largest = max(grey, float(threat_model.eps))
    inner = {str(m): float(m * threat_model.eps) for m in MULTIPLES if float(m * threat_model.eps) < largest}
    return inner | {f"{threat_model.norm} {largest:.3g}": largest}


@dataclass(frozen=True)
class _Images:
    """A subset of the images, and the network to check."""

    network: nn.Module
    x: Tensor
    y: Tensor
    ids: NDArray[np.int64]
    seed: int

    def keys(self, purpose: str) -> Tensor:
        return device_keys(self.ids, self.x.device, self.seed, "honesty", purpose)

    def still_right(self, candidates: Tensor, attack: Callable[[_Images], Tensor]) -> Tensor:
        """`candidates`, bool [n], without those that the attack breaks; only candidates are attacked."""
        rows = candidates.nonzero().flatten()
        if not len(rows):
            return candidates
        part = _Images(self.network, self.x[rows], self.y[rows], self.ids[rows.cpu().numpy()], self.seed)
        adversarial = attack(part)
        with torch.no_grad():
            is_correct = ranked(self.network(adversarial))[:, 0] == part.y
        return candidates.index_copy(0, rows, is_correct)


def _cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(logits, y, reduction="none")


def _margin(logits: Tensor, y: Tensor) -> Tensor:
    """Largest wrong logit minus the true one (Carlini and Wagner, S&P 2017, f_6): unlike cross-entropy, its gradient
    does not vanish for confident networks."""
    own = F.one_hot(y, logits.shape[1]).bool()
    return logits.masked_fill(own, -math.inf).amax(dim=1) - logits.masked_fill(~own, 0.0).sum(dim=1)


def _pgd(ball: Ball, steps: int, loss: Callable[[Tensor, Tensor], Tensor], purpose: str) -> Callable[[_Images], Tensor]:
    """PGD from a random start with steps of 2.5 eps / steps (Madry et al., ICLR 2018)."""

    def attack(part: _Images) -> Tensor:
        start = ball.random_start(part.x, part.keys(purpose))
        size = 2.5 * ball.eps / steps
        return pgd(part.network, part.x, lambda z: loss(z, part.y), ball=ball, steps=steps, step_size=size, start=start)

    return attack


def _one_step(ball: Ball) -> Callable[[_Images], Tensor]:
    """FGSM (Goodfellow et al., ICLR 2015): one step of length eps from the clean image."""

    def attack(part: _Images) -> Tensor:
        loss = lambda z: _cross_entropy(z, part.y)  # noqa: E731
        return pgd(part.network, part.x, loss, ball=ball, steps=1, step_size=ball.eps, start=part.x)

    return attack


def _square(threat_model: ThreatModel) -> Callable[[_Images], Tensor]:
    """Square (Andriushchenko et al., ECCV 2020), which uses logits only. The global random state is preserved."""

    def attack(part: _Images) -> Tensor:
        seed = scope_key(part.seed, "honesty", "square", int(part.ids[0])) % 2**31
        norm = "Linf" if threat_model.norm == "linf" else "L2"
        square = SquareAttack(part.network, norm=norm, n_queries=QUERIES, eps=float(threat_model.eps), seed=seed)
        with torch.random.fork_rng(devices=[part.x.device] if part.x.is_cuda else []), torch.no_grad():
            return square.perturb(part.x, part.y)

    return attack


def _slope(images: _Images, ball: Ball) -> tuple[Tensor, Tensor]:
    """(gradient of cross-entropy is zero or not finite, margin changes as its gradient predicts), bool [n] each.

    At a random point of the ball. The change is a central difference of half-width SLOPE eps.
    """
    point = ball.random_start(images.x, images.keys("slope")).requires_grad_(True)
    with torch.enable_grad():
        logits = images.network(point)
        losses = [_cross_entropy(logits, images.y).sum(), _margin(logits, images.y).sum()]
    loss_grad, grad = (torch.autograd.grad(loss, point, retain_graph=True)[0].flatten(1) for loss in losses)
    dead = (loss_grad == 0).all(dim=1) | ~loss_grad.isfinite().all(dim=1)
    with torch.no_grad():
        grad = grad.view_as(point)
        step = ball.step(torch.zeros_like(grad), grad, SLOPE * ball.eps)
        up, down = (_margin(images.network(point + sign * step), images.y) for sign in (1, -1))
        measured, predicted = (up - down) / 2, (grad * step).flatten(1).sum(dim=1)
        tolerance = AGREEMENT * torch.maximum(measured.abs(), predicted.abs()) + ROUNDING * logits.abs().amax(dim=1)
        return dead, (measured - predicted).abs() <= tolerance


def _gap(logits: Tensor, others: Tensor) -> Tensor:
    """Largest difference of a logit, relative to the image's largest logit: [n]. NaN propagates."""
    return (logits - others).abs().amax(dim=1) / logits.abs().amax(dim=1).clamp_min(torch.finfo(logits.dtype).tiny)


@dataclass(frozen=True)
class Probes:
    """Columns for `checks.build_checks` of a network evaluated by `pgd`."""

    pgd: Pgd
    twins: tuple[nn.Module, ...] = ()
    """Networks in eval mode, on the images' device, whose logits must be the same."""

    @property
    def name(self) -> str:
        return "honesty"

    @property
    def settings(self) -> dict[str, Any]:
        budgets = {"curve_steps": CURVE_STEPS, "longer": LONGER, "queries": QUERIES, "slope": SLOPE}
        return {**self.pgd.settings, **budgets}

    @property
    def title(self) -> str:
        return f"honesty of {self.pgd.title}"

    def verdicts(self, network: nn.Module, x: Tensor, y: Tensor, ids: NDArray[np.int64]) -> dict[str, Tensor]:
        threat_model = self.pgd.threat_model
        assert threat_model is not None
        images, ball = _Images(network, x, y, ids, self.pgd.seed), ball_of(threat_model)
        verdicts = self.pgd.verdicts(network, x, y, ids)
        right, robust_to_pgd = verdicts["clean_correct"], verdicts["robust_correct"]
        columns = {"clean_correct": right, "robust_correct": robust_to_pgd}
        columns |= self._curve(images, right, robust_to_pgd)
        longer = _pgd(ball, LONGER * self.pgd.steps, _cross_entropy, "longer")
        columns["withstands_longer"] = images.still_right(robust_to_pgd, longer)
        columns["withstands_one_step"] = images.still_right(robust_to_pgd, _one_step(ball))
        columns["withstands_margin"] = images.still_right(robust_to_pgd, _pgd(ball, self.pgd.steps, _margin, "margin"))
        if threat_model.norm == "linf" or min(x.shape[-2:]) >= SMALLEST_SIDE_L2:
            columns["withstands_square"] = images.still_right(robust_to_pgd, _square(threat_model))
        columns["dead_gradient"], columns["follows_gradient"] = _slope(images, ball)
        return columns | self._logits(images, ball)

    def _curve(self, images: _Images, right: Tensor, robust_to_pgd: Tensor) -> dict[str, Tensor]:
        assert self.pgd.threat_model is not None
        kind = LinfBall if self.pgd.threat_model.norm == "linf" else L2Ball
        columns, label, ball = {f"{RADIUS}0": right}, "", kind(0.0)
        for label, radius in radii(self.pgd.threat_model, images.x.shape[1:]).items():
            ball = kind(radius)
            attack = _pgd(ball, CURVE_STEPS, _cross_entropy, label)
            columns[RADIUS + label] = robust_to_pgd if label == "1" else images.still_right(right, attack)
        for restart, loss in enumerate([_cross_entropy] * 4 + [_margin]):
            again = _pgd(ball, CURVE_STEPS, loss, f"{label} {restart}")
            columns[RADIUS + label] = images.still_right(columns[RADIUS + label], again)
        return columns

    @torch.no_grad()
    def _logits(self, images: _Images, ball: Ball) -> dict[str, Tensor]:
        network, x = images.network, images.x
        both = (x, ball.random_start(x, images.keys("logits")))
        logits = [network(points) for points in both]
        again = [_gap(first, network(points)) for first, points in zip(logits, both, strict=True)]
        columns = {"repeat_gap": torch.stack(again).amax(dim=0)}
        gaps = [_gap(first, twin(points)) for twin in self.twins for first, points in zip(logits, both, strict=True)]
        if gaps:
            columns["twin_gap"] = torch.stack(gaps).amax(dim=0)
        total, clean = logits[0].sum(dim=1), logits[0]
        columns["probabilities"] = (clean >= 0).all(dim=1) & ((total - 1).abs() < ROUNDING)
        return columns
