"""Building blocks of the corruptions: Gaussian filter, motion blur, zoom, bilinear sampling.

Sums are in float64, so that the 8-bit results depend on neither the batch nor the device.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.robustness.noise import derived_keys, uniform_noise


def split_keys(keys: Tensor, count: int) -> tuple[Tensor, ...]:
    """Split keys [n] into `count` tensors of keys [n] for independent draws."""
    return derived_keys(keys, torch.arange(count, device=keys.device)).unbind(1)


def quantise(x: Tensor) -> Tensor:
    """Truncate to the 256 levels of [0, 1]. A value within rounding error below a level counts as that level."""
    return (x.clamp(0, 1) * 255.0 + 1e-3).floor() / 255.0


def symmetric_index(places: Tensor, side: int) -> Tensor:
    """Indices int64 under symmetric padding: ...1 0 | 0 1 ... side-1 | side-1 side-2..."""
    index = places.remainder(2 * side)
    return torch.where(index < side, index, 2 * side - 1 - index)


def reflect_index(places: Tensor, side: int) -> Tensor:
    """Indices int64 under reflect padding, without repeated borders: ...2 1 | 0 1 ... side-1 | side-2..."""
    index = places.remainder(2 * side - 2)
    return torch.where(index < side, index, 2 * side - 2 - index)


def gaussian_filter(x: Tensor, deviation: float, *, truncate: float = 4.0, mirror: bool = False) -> Tensor:
    """Gaussian filter of [..., h, w], truncated at `truncate` standard deviations: float64. Padding repeats the border
    pixels, or is symmetric with `mirror`."""
    rows, columns = (_gaussian(side, deviation, truncate, mirror).to(x.device) for side in x.shape[-2:])
    return rows @ x.double() @ columns.T


def _gaussian(side: int, deviation: float, truncate: float, mirror: bool) -> Tensor:
    """The filter along one axis as a matrix [side, side]; it may be wider than the image."""
    radius = int(truncate * deviation + 0.5)
    places = torch.arange(-radius, radius + 1)
    weights = torch.exp(-0.5 * (places.double() / deviation) ** 2)
    sources = torch.arange(side)[:, None] + places
    sources = symmetric_index(sources, side) if mirror else sources.clamp(0, side - 1)
    matrix = torch.zeros(side, side, dtype=torch.float64)
    return matrix.scatter_add_(1, sources, (weights / weights.sum()).expand(side, -1))


def motion_blur(x: Tensor, keys: Tensor, radius: int, deviation: float, angles: tuple[float, float]) -> Tensor:
    """ImageMagick's motion blur of [n, c, h, w], rounded to 8 bits: a one-sided Gaussian over 2 radius + 1 pixels, at
    an angle per image drawn from `angles` (degrees). Padding repeats the border pixels."""
    first, last = angles
    angle = torch.deg2rad(first + (last - first) * uniform_noise(keys, (1,)).cpu().double())
    steps = torch.arange(2 * radius + 1, dtype=torch.float64)
    weights = torch.exp(-0.5 * (steps / deviation) ** 2)
    weights = (weights / weights.sum()).tolist()
    right, down = ((steps * direction - 0.5).ceil().long().to(x.device) for direction in (angle.cos(), angle.sin()))
    height, width = x.shape[2:]
    images = torch.arange(len(x), device=x.device)[:, None, None, None]
    channels = torch.arange(x.shape[1], device=x.device)[None, :, None, None]
    rows, columns = torch.arange(height, device=x.device), torch.arange(width, device=x.device)
    total = torch.zeros_like(x, dtype=torch.float64)
    for i, weight in enumerate(weights):
        y = (rows + down[:, i, None]).clamp(0, height - 1)[:, None, :, None]
        total += weight * x[images, channels, y, (columns + right[:, i, None]).clamp(0, width - 1)[:, None, None]]
    return (total * 255.0).round() / 255.0


def zoom_centre(x: Tensor, factor: float) -> Tensor:
    """Enlarge the centre of square images [n, c, h, h] to full size, bilinearly with aligned corners."""
    side = x.shape[-1]
    part = math.ceil(side / factor)
    first = (side - part) // 2
    size = round(part * factor)
    middle = x[..., first : first + part, first : first + part].double()
    large = F.interpolate(middle, size=(size, size), mode="bilinear", align_corners=True)
    trim = (size - side) // 2
    return large[..., trim : trim + side, trim : trim + side]


def sample_bilinear(x: Tensor, y: Tensor, across: Tensor, *, centred: bool) -> Tensor:
    """Sample [n, c, h, w] bilinearly at rows y and columns `across`, [n, h, w] float64; the result is float64.
    Padding is reflect if `centred`, else symmetric."""
    padded_index = reflect_index if centred else symmetric_index
    n, c, height, width = x.shape
    flat, top, left = x.double().flatten(2), y.floor(), across.floor()
    total = torch.zeros_like(flat).view(n, c, height, width)
    for down in (0, 1):
        for right in (0, 1):
            rows, columns = padded_index(top.long() + down, height), padded_index(left.long() + right, width)
            places = (rows * width + columns).flatten(1)[:, None].expand(-1, c, -1)
            weight = (1 - (y - top - down).abs()) * (1 - (across - left - right).abs())
            total += weight[:, None] * flat.gather(2, places).view(n, c, height, width)
    return total
