"""Blurs, as Hendrycks and Dietterich define them: Gaussian, defocus, glass, motion and zoom."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.evaluation.corruptions.resampling import (
    gaussian_filter,
    motion_blur,
    quantise,
    reflect_index,
    zoom_centre,
)
from pipeline.robustness.noise import uniform_noise

MOTION_ANGLES = (-45.0, 45.0)
DISK_RADIUS = 8
"""Smallest half-width of the kernel, in pixels: smaller disks are padded to it."""


def gaussian(x: Tensor, keys: Tensor, deviation: float) -> Tensor:
    return gaussian_filter(x, deviation)


def defocus(x: Tensor, keys: Tensor, constant: tuple[float, float]) -> Tensor:
    """Convolution with a soft-edged disk, by FFT in float64. The image is reflected at its border pixels."""
    disk = disk_kernel(*constant)
    radius, (height, width) = len(disk) // 2, x.shape[2:]
    rows, columns = (reflect_index(torch.arange(-radius, side + radius), side) for side in (height, width))
    around = x.double()[:, :, rows.to(x.device)][..., columns.to(x.device)]
    size = around.shape[-2:]
    # The disk is symmetric, so convolution equals the published correlation.
    spectrum = torch.fft.rfft2(around) * torch.fft.rfft2(disk.to(x.device), s=size)
    return torch.fft.irfft2(spectrum, s=size)[..., 2 * radius :, 2 * radius :]


def disk_kernel(radius: float, soft: float) -> Tensor:
    """[k, k] float64: a disk that sums to 1, smoothed by a Gaussian of 3 taps (5 for a large disk)."""
    reach = DISK_RADIUS if radius <= DISK_RADIUS else int(radius)
    places = torch.arange(-reach, reach + 1, dtype=torch.float64)
    disk = (places**2 + places[:, None] ** 2 <= radius**2).double()
    taps = torch.arange(-1, 2) if radius <= DISK_RADIUS else torch.arange(-2, 3)
    weights = torch.exp(-0.5 * (taps.double() / soft) ** 2)
    side = len(places)
    sources = reflect_index(torch.arange(side)[:, None] + taps, side)
    matrix = torch.zeros(side, side, dtype=torch.float64)
    matrix.scatter_add_(1, sources, (weights / weights.sum()).expand(side, -1))
    return matrix @ (disk / disk.sum()) @ matrix.T


def glass(x: Tensor, keys: Tensor, constant: tuple[float, int, int]) -> Tensor:
    """Blur, replace each pixel by a random neighbour from the last pixel to the first, `times` times, and blur again.

    The paper describes swaps. Its code copies one pixel over the other, because NumPy's rows are views; so does this.
    """
    deviation, reach, times = constant
    pixels = quantise(gaussian_filter(x, deviation)).flatten(2)
    inner = x.shape[-1] - 2 * reach
    draws = uniform_noise(keys, (times, inner, inner, 2))
    for offsets in ((draws.double() * 2 * reach).floor().long() - reach).unbind(1):
        sources = _source_indices(offsets, reach, x.shape[-1])
        pixels = pixels.gather(2, sources[:, None].expand_as(pixels))
    return gaussian_filter(pixels.view_as(x), deviation)


def _source_indices(offsets: Tensor, reach: int, side: int) -> Tensor:
    """Source index of every pixel, [n, side * side] int64, after the pixels from (side - reach, side - reach) back to
    (reach + 1, reach + 1) are overwritten one by one with the pixel at `offsets` [n, k, k, (down, right)]."""
    rows, columns = (torch.arange(reach + 1, side - reach + 1, device=offsets.device) for _ in range(2))
    rows = rows[:, None]
    own = torch.arange(side * side, device=offsets.device).expand(len(offsets), -1)
    sources = own.clone().view(-1, side, side)
    down, right = offsets.unbind(-1)
    sources[:, reach + 1 : side - reach + 1, reach + 1 : side - reach + 1] = (rows + down) * side + columns + right
    sources = sources.flatten(1)
    # A source with a higher index was itself overwritten earlier. Follow such chains to their end by pointer doubling;
    # the value there comes from one last step.
    is_overwritten = sources != own
    chain = torch.where(is_overwritten & is_overwritten.gather(1, sources) & (sources > own), sources, own)
    while not torch.equal(doubled := chain.gather(1, chain), chain):
        chain = doubled
    return sources.gather(1, chain)


def motion(x: Tensor, keys: Tensor, constant: tuple[int, float]) -> Tensor:
    return motion_blur(x, keys, *constant, MOTION_ANGLES)


def zoom(x: Tensor, keys: Tensor, factors: tuple[float, ...]) -> Tensor:
    """Mean of the image and its enlargements by each factor."""
    return (x.double() + sum(zoom_centre(x, factor) for factor in factors)) / (len(factors) + 1)
