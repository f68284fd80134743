"""Initial scores: scaled from the weights, as in the paper, or drawn at random.

Random scores are a function of (seed, kind, layer name, position in the layer), computed by numpy on the CPU: the same
on every device and rank, for any number of ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.rng import sample_keys, uniforms

FirstScore = Callable[[str, Tensor], Tensor]
"""(plain name, weight) -> the layer's initial scores, of the weight's shape, dtype and device."""

BLOCK = 1 << 22
"""Numbers drawn at once: a layer of 100 million connections would need gigabytes of keys."""


def scaled(name: str, weight: Tensor) -> Tensor:
    """sqrt(6 / fan_in) * w / max|w| (HYDRA's scaled initialisation): ranks connections by magnitude.

    Errors: ValueError naming an all-zero or NaN weight, which has no ranking.
    """
    weight = weight.detach()
    largest = weight.abs().amax()
    if not bool(largest > 0):
        raise ValueError(
            f"{name}: the largest |weight| is zero or NaN, so scores cannot be scaled by it; "
            "start from a trained network"
        )
    return math.sqrt(6 / weight[0].numel()) * weight / largest


def first_scores(kind: str, seed: int) -> FirstScore:
    """`scaled`, ones, or one of DRAWS."""
    if kind == "ones":
        return lambda name, weight: torch.ones_like(weight, requires_grad=False)
    return scaled if kind == "scaled" else random_scores(kind, seed)


def zero(name: str, weight: Tensor) -> Tensor:
    """Placeholder for scores that are about to be loaded."""
    return torch.zeros_like(weight, requires_grad=False)


def _symmetric(keys: NDArray[np.uint64], count: int) -> NDArray[np.float64]:
    """Uniform in [-1, 1)."""
    return 2.0 * uniforms(keys, count) - 1.0


def _normal(keys: NDArray[np.uint64], count: int) -> NDArray[np.float64]:
    """Standard normal (Box and Muller 1958)."""
    first, second = np.split(uniforms(keys, 2 * count), 2, axis=1)
    return np.sqrt(-2.0 * np.log1p(-first)) * np.cos(2.0 * math.pi * second)


DRAWS = {
    "random": (_symmetric, lambda fan_in, fan_out: 1.0),
    "kaiming_uniform": (_symmetric, lambda fan_in, fan_out: math.sqrt(6 / fan_in)),
    "kaiming_normal": (_normal, lambda fan_in, fan_out: math.sqrt(2 / fan_in)),
    "xavier_uniform": (_symmetric, lambda fan_in, fan_out: math.sqrt(12 / (fan_in + fan_out))),
    "xavier_normal": (_normal, lambda fan_in, fan_out: math.sqrt(4 / (fan_in + fan_out))),
}
"""Kind -> distribution and scale: He et al. 2015, and Glorot and Bengio 2010 with ReLU's gain sqrt(2), as in HYDRA's
reference code. Under `random`, every connection of a network is equally likely to rank first."""


def random_scores(kind: str, seed: int) -> FirstScore:
    """Initial scores of one of the kinds in DRAWS."""
    draw, scale_of = DRAWS[kind]

    def initial_scores(name: str, weight: Tensor) -> Tensor:
        field = weight[0, 0].numel()
        scale = scale_of(weight.shape[1] * field, weight.shape[0] * field)
        return _drawn(weight, draw, scale, seed, "score", kind, name)

    return initial_scores


def uniform_draws(weight: Tensor, seed: int, purpose: str, *scope: int | str) -> Tensor:
    """One number per connection, uniform in [0, 1], of the weight's shape, dtype and device; keyed as in `rng`."""
    return _drawn(weight, uniforms, 1.0, seed, purpose, *scope)


def _drawn(
    weight: Tensor,
    draw: Callable[[NDArray[np.uint64], int], NDArray[np.float64]],
    scale: float,
    seed: int,
    purpose: str,
    *scope: int | str,
) -> Tensor:
    """One number per connection, one stream per output of the layer."""
    outputs, inputs = weight.shape[0], weight[0].numel()
    keys = sample_keys(np.arange(outputs), seed, purpose, *scope)
    score = np.empty((outputs, inputs), np.float32)
    rows = max(BLOCK // inputs, 1)
    for start in range(0, outputs, rows):
        score[start : start + rows] = scale * draw(keys[start : start + rows], inputs)
    return torch.from_numpy(score).view(weight.shape).to(weight)
