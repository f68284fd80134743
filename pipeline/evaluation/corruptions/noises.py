"""Independent noise per pixel: Gaussian, shot, impulse and speckle, as Hendrycks and Dietterich define them."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.robustness.noise import gaussian_noise, uniform_noise


def gaussian(x: Tensor, keys: Tensor, deviation: float) -> Tensor:
    return x + deviation * gaussian_noise(keys, x.shape[1:])


def speckle(x: Tensor, keys: Tensor, deviation: float) -> Tensor:
    """Gaussian noise proportional to the value."""
    return x + x * deviation * gaussian_noise(keys, x.shape[1:])


def shot(x: Tensor, keys: Tensor, photons: float) -> Tensor:
    """Poisson counts of mean x * photons, by inversion: the number of values of the cumulative distribution function
    that a uniform draw reaches."""
    mean = x.double() * photons
    uniform = uniform_noise(keys, x.shape[1:]).double()
    count, probability = torch.zeros_like(mean), torch.exp(-mean)
    below = probability.clone()
    # Uniform draws of 24 bits end at 1 - 2^-24, which mean + 6 deviations + a few counts covers.
    for k in range(1, int(photons + 6 * photons**0.5) + 10):
        count += uniform >= below
        probability *= mean / k
        below += probability
    return (count / photons).float()


def impulse(x: Tensor, keys: Tensor, share: float) -> Tensor:
    """Sets a fraction `share` of all values to 0 or 1 with equal probability."""
    uniform = uniform_noise(keys, x.shape[1:])
    salted = torch.where(uniform < share, 1.0, x)
    return torch.where(uniform < share / 2, 0.0, salted)
