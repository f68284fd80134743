"""Blurs, as Hendrycks and Dietterich define them: Gaussian, defocus, glass, motion and zoom."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.evaluation.corruptions.resampling import levels, mirrored_at_centre, moved, smooth, zoomed
from pipeline.robustness.noise import uniform_noise

MOTION_ANGLES = (-45.0, 45.0)
DISK_RADIUS = 8
"""Smaller disks are drawn in as many pixels to each side, too."""


def gaussian(x: Tensor, keys: Tensor, deviation: float) -> Tensor:
    return smooth(x, deviation)


def defocus(x: Tensor, keys: Tensor, constant: tuple[float, float]) -> Tensor:
    """A disk with a softened edge, laid over the image, which is mirrored at its border pixels: by Fourier transforms,
    in float64."""
    disk = disk_of(*constant)
    radius, (height, width) = len(disk) // 2, x.shape[2:]
    rows, columns = (mirrored_at_centre(torch.arange(-radius, side + radius), side) for side in (height, width))
    around = x.double()[:, :, rows.to(x.device)][..., columns.to(x.device)]
    size = around.shape[-2:]
    # A disk is the same turned by half a turn, so that it does not matter that this is a convolution.
    spectrum = torch.fft.rfft2(around) * torch.fft.rfft2(disk.to(x.device), s=size)
    return torch.fft.irfft2(spectrum, s=size)[..., 2 * radius :, 2 * radius :]


def disk_of(radius: float, soft: float) -> Tensor:
    """[k, k] float64: a disk of sum 1, smoothed by a Gaussian of 3 pixels, or 5 for large ones, inside its square."""
    reach = DISK_RADIUS if radius <= DISK_RADIUS else int(radius)
    places = torch.arange(-reach, reach + 1, dtype=torch.float64)
    disk = (places**2 + places[:, None] ** 2 <= radius**2).double()
    taps = torch.arange(-1, 2) if radius <= DISK_RADIUS else torch.arange(-2, 3)
    weights = torch.exp(-0.5 * (taps.double() / soft) ** 2)
    side = len(places)
    sources = mirrored_at_centre(torch.arange(side)[:, None] + taps, side)
    matrix = torch.zeros(side, side, dtype=torch.float64)
    matrix.scatter_add_(1, sources, (weights / weights.sum()).expand(side, -1))
    return matrix @ (disk / disk.sum()) @ matrix.T


def glass(x: Tensor, keys: Tensor, constant: tuple[float, int, int]) -> Tensor:
    """A little blurred, then pixel by pixel from the last one on taken from nearby, some times over, and blurred again.

    The paper says that pixels are exchanged. What made its images copies one onto the other, as NumPy's rows are views;
    so does this.
    """
    deviation, reach, times = constant
    pixels = levels(smooth(x, deviation)).flatten(2)
    inner = x.shape[-1] - 2 * reach
    draws = uniform_noise(keys, (times, inner, inner, 2))
    for offsets in ((draws.double() * 2 * reach).floor().long() - reach).unbind(1):
        sources = _copied_from(offsets, reach, x.shape[-1])
        pixels = pixels.gather(2, sources[:, None].expand_as(pixels))
    return smooth(pixels.view_as(x), deviation)


def _copied_from(offsets: Tensor, reach: int, side: int) -> Tensor:
    """Where each pixel's value is from, [n, side * side], once pixels from (side - reach, side - reach) back to
    (reach + 1, reach + 1) were each overwritten with the one `offsets` [n, k, k, (down, right)] away, one by one."""
    rows, columns = (torch.arange(reach + 1, side - reach + 1, device=offsets.device) for _ in range(2))
    rows = rows[:, None]
    own = torch.arange(side * side, device=offsets.device).expand(len(offsets), -1)
    sources = own.clone().view(-1, side, side)
    down, right = offsets.unbind(-1)
    sources[:, reach + 1 : side - reach + 1, reach + 1 : side - reach + 1] = (rows + down) * side + columns + right
    sources = sources.flatten(1)
    # A source further on was overwritten before, with what its own source had then. So the way leads from pixel to
    # pixel as long as it leads on, which is followed by doubling, and ends with one more step.
    changed = sources != own
    way = torch.where(changed & changed.gather(1, sources) & (sources > own), sources, own)
    while not torch.equal(further := way.gather(1, way), way):
        way = further
    return sources.gather(1, way)


def motion(x: Tensor, keys: Tensor, constant: tuple[int, float]) -> Tensor:
    return moved(x, keys, *constant, MOTION_ANGLES)


def zoom(x: Tensor, keys: Tensor, factors: tuple[float, ...]) -> Tensor:
    """The mean of the image and what it is enlarged by each of these factors."""
    return (x.double() + sum(zoomed(x, factor) for factor in factors)) / (len(factors) + 1)
