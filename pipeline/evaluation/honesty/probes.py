"""What honesty checks measure, image by image: other attacks on what PGD does not break, and the gradient it followed.

A measure like any other, so that chunks, workers and interruptions change no verdict: every random number is keyed by
sample ids, those of Square by the chunk. `pipeline.evaluation.honesty.checks` says what the columns mean. In fp32.
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
"""Radii of the curve, in eps; 0 and a radius at which nothing can be robust join them."""
CURVE_STEPS = 8
LONGER = 3
"""How many times as many steps the longer attack has."""
QUERIES = 100
"""Forwards that Square may take per image."""
SMALLEST_SIDE_L2 = 25
"""In pixels: Square for l2 tiles an image with squares of a fifth of its side, which jut out of smaller ones."""
SLOPE = 0.1
"""Length, in eps, of the two steps that finite differences are taken over: about that of one of PGD's."""
AGREEMENT = 0.5
"""Largest relative difference between the rise that a gradient promises and the one there is."""
ROUNDING = 1e-5
"""Of the largest logit: a difference between two logits that fp32 does not resolve."""

RADIUS = "at "
"""Columns of the curve: whether the image is right at this radius."""


def radii(threat_model: ThreatModel, shape: torch.Size) -> dict[str, float]:
    """Label -> radius, rising, without 0, for images of `shape`.

    At the last one every image may become the same grey one, so that an attack that works leaves none. As it may get
    stuck far from the images, where ReLUs are dead, it has six starts there: of 276 images, the demo's network that is
    99 % pruned by magnitude kept 11 after one start, 5 after three and 3 after six.
    """
    linf = threat_model.norm == "linf"
    grey = 0.5 if linf else 0.5 * math.sqrt(math.prod(shape))
    largest = max(grey, float(threat_model.eps))
    inner = {str(m): float(m * threat_model.eps) for m in MULTIPLES if float(m * threat_model.eps) < largest}
    return inner | {f"{threat_model.norm} {largest:.3g}": largest}


@dataclass(frozen=True)
class _Images:
    """Some of the images, and the network that is checked."""

    network: nn.Module
    x: Tensor
    y: Tensor
    ids: NDArray[np.int64]
    seed: int

    def keys(self, purpose: str) -> Tensor:
        return device_keys(self.ids, self.x.device, self.seed, "honesty", purpose)

    def still_right(self, candidates: Tensor, attack: Callable[[_Images], Tensor]) -> Tensor:
        """`candidates`, bool [n], less those that an attack breaks; the others are not attacked."""
        rows = candidates.nonzero().flatten()
        if not len(rows):
            return candidates
        part = _Images(self.network, self.x[rows], self.y[rows], self.ids[rows.cpu().numpy()], self.seed)
        adversarial = attack(part)
        with torch.no_grad():
            right = ranked(self.network(adversarial))[:, 0] == part.y
        return candidates.index_copy(0, rows, right)


def _cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(logits, y, reduction="none")


def _margin(logits: Tensor, y: Tensor) -> Tensor:
    """The largest wrong logit less the right one (Carlini and Wagner, S&P 2017, f_6): unlike cross-entropy it has a
    gradient however sure a network is."""
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
    """FGSM (Goodfellow et al., ICLR 2015): a whole eps from the image itself."""

    def attack(part: _Images) -> Tensor:
        loss = lambda z: _cross_entropy(z, part.y)  # noqa: E731
        return pgd(part.network, part.x, loss, ball=ball, steps=1, step_size=ball.eps, start=part.x)

    return attack


def _square(threat_model: ThreatModel) -> Callable[[_Images], Tensor]:
    """Square (Andriushchenko et al., ECCV 2020), which asks for logits only. The caller's random state is kept."""

    def attack(part: _Images) -> Tensor:
        seed = scope_key(part.seed, "honesty", "square", int(part.ids[0])) % 2**31
        norm = "Linf" if threat_model.norm == "linf" else "L2"
        square = SquareAttack(part.network, norm=norm, n_queries=QUERIES, eps=float(threat_model.eps), seed=seed)
        with torch.random.fork_rng(devices=[part.x.device] if part.x.is_cuda else []), torch.no_grad():
            return square.perturb(part.x, part.y)

    return attack


def _slope(images: _Images, ball: Ball) -> tuple[Tensor, Tensor]:
    """(gradient of cross-entropy is zero or not finite, margin rises as its gradient promises), bool [n].

    Both at a random point of the ball, where PGD walks. The rise is a central difference over SLOPE eps.
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
        measured, promised = (up - down) / 2, (grad * step).flatten(1).sum(dim=1)
        allowed = AGREEMENT * torch.maximum(measured.abs(), promised.abs()) + ROUNDING * logits.abs().amax(dim=1)
        return dead, (measured - promised).abs() <= allowed


def _gap(logits: Tensor, others: Tensor) -> Tensor:
    """Largest difference of a logit, in units of the image's largest logit: [n]; NaN where one is."""
    return (logits - others).abs().amax(dim=1) / logits.abs().amax(dim=1).clamp_min(torch.finfo(logits.dtype).tiny)


@dataclass(frozen=True)
class Probes:
    """Columns for `honesty.build_checks`, of networks that `pgd` attacks."""

    pgd: Pgd
    twins: tuple[nn.Module, ...] = ()
    """Networks in eval mode, on the images' device, that shall give the same logits."""

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
        right, standing = verdicts["clean_correct"], verdicts["robust_correct"]
        columns = {"clean_correct": right, "robust_correct": standing}
        columns |= self._curve(images, right, standing)
        longer = _pgd(ball, LONGER * self.pgd.steps, _cross_entropy, "longer")
        columns["withstands_longer"] = images.still_right(standing, longer)
        columns["withstands_one_step"] = images.still_right(standing, _one_step(ball))
        columns["withstands_margin"] = images.still_right(standing, _pgd(ball, self.pgd.steps, _margin, "margin"))
        if threat_model.norm == "linf" or min(x.shape[-2:]) >= SMALLEST_SIDE_L2:
            columns["withstands_square"] = images.still_right(standing, _square(threat_model))
        columns["dead_gradient"], columns["follows_gradient"] = _slope(images, ball)
        return columns | self._logits(images, ball)

    def _curve(self, images: _Images, right: Tensor, standing: Tensor) -> dict[str, Tensor]:
        assert self.pgd.threat_model is not None
        kind = LinfBall if self.pgd.threat_model.norm == "linf" else L2Ball
        columns, label, ball = {f"{RADIUS}0": right}, "", kind(0.0)
        for label, radius in radii(self.pgd.threat_model, images.x.shape[1:]).items():
            ball = kind(radius)
            attack = _pgd(ball, CURVE_STEPS, _cross_entropy, label)
            columns[RADIUS + label] = standing if label == "1" else images.still_right(right, attack)
        for attempt, loss in enumerate([_cross_entropy] * 4 + [_margin]):
            again = _pgd(ball, CURVE_STEPS, loss, f"{label} {attempt}")
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
