"""Noise of every pixel by itself: Gaussian, shot, impulse and speckle, as Hendrycks and Dietterich define them."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.robustness.noise import gaussian_noise, uniform_noise


def gaussian(x: Tensor, keys: Tensor, deviation: float) -> Tensor:
    return x + deviation * gaussian_noise(keys, x.shape[1:])


def speckle(x: Tensor, keys: Tensor, deviation: float) -> Tensor:
    """In proportion to the value."""
    return x + x * deviation * gaussian_noise(keys, x.shape[1:])


def shot(x: Tensor, keys: Tensor, photons: float) -> Tensor:
    """Poisson counts of mean x * photons, by inversion: the count is how many values of the distribution function the
    uniform number exceeds."""
    mean = x.double() * photons
    uniform = uniform_noise(keys, x.shape[1:]).double()
    count, probability = torch.zeros_like(mean), torch.exp(-mean)
    below = probability.clone()
    # 24-bit numbers end 2^-24 before 1, which is nearer than 6 deviations and a few counts.
    for k in range(1, int(photons + 6 * photons**0.5) + 10):
        count += uniform >= below
        probability *= mean / k
        below += probability
    return (count / photons).float()


def impulse(x: Tensor, keys: Tensor, share: float) -> Tensor:
    """This share of all values becomes 0 or 1, half of them each."""
    uniform = uniform_noise(keys, x.shape[1:])
    salted = torch.where(uniform < share, 1.0, x)
    return torch.where(uniform < share / 2, 0.0, salted)
