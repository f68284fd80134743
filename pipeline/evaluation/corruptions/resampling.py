"""What blurs, weather and distortions are made of: Gaussian filters, motion, zoom, values between pixels.

Sums are taken in float64, so that neither the batch nor the device shows once they are cut to 8 bits.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.robustness.noise import derived_keys, uniform_noise


def streams(keys: Tensor, count: int) -> tuple[Tensor, ...]:
    """Keys [n] -> `count` keys [n] each, of draws that have nothing to do with one another."""
    return derived_keys(keys, torch.arange(count, device=keys.device)).unbind(1)


def levels(x: Tensor) -> Tensor:
    """Values in [0, 1] cut to 8 bits. Just below the next level is rounding, not a smaller value."""
    return (x.clamp(0, 1) * 255.0 + 1e-3).floor() / 255.0


def mirrored(places: Tensor, side: int) -> Tensor:
    """Pixels that stand in for those outside, int64: ...1 0 | 0 1 ... side-1 | side-1 side-2..."""
    there = places.remainder(2 * side)
    return torch.where(there < side, there, 2 * side - 1 - there)


def mirrored_at_centre(places: Tensor, side: int) -> Tensor:
    """Likewise, with the border pixels not repeated: ...2 1 | 0 1 ... side-1 | side-2..."""
    there = places.remainder(2 * side - 2)
    return torch.where(there < side, there, 2 * side - 2 - there)


def smooth(x: Tensor, deviation: float, *, truncate: float = 4.0, mirror: bool = False) -> Tensor:
    """A Gaussian over [..., h, w], cut `truncate` deviations to each side: float64. Outside, the border pixels go on,
    or the image is mirrored."""
    rows, columns = (_gaussian(side, deviation, truncate, mirror).to(x.device) for side in x.shape[-2:])
    return rows @ x.double() @ columns.T


def _gaussian(side: int, deviation: float, truncate: float, mirror: bool) -> Tensor:
    """The filter along one axis as a matrix [side, side], as it may reach beyond the image more than once."""
    radius = int(truncate * deviation + 0.5)
    places = torch.arange(-radius, radius + 1)
    weights = torch.exp(-0.5 * (places.double() / deviation) ** 2)
    sources = torch.arange(side)[:, None] + places
    sources = mirrored(sources, side) if mirror else sources.clamp(0, side - 1)
    matrix = torch.zeros(side, side, dtype=torch.float64)
    return matrix.scatter_add_(1, sources, (weights / weights.sum()).expand(side, -1))


def moved(x: Tensor, keys: Tensor, radius: int, deviation: float, angles: tuple[float, float]) -> Tensor:
    """ImageMagick's motion blur of [n, c, h, w], each image along an angle of its own between these (in degrees),
    rounded to 8 bits: half a Gaussian over 2 radius + 1 whole pixels; the border pixels go on outside."""
    first, last = angles
    angle = torch.deg2rad(first + (last - first) * uniform_noise(keys, (1,)).cpu().double())
    steps = torch.arange(2 * radius + 1, dtype=torch.float64)
    weights = torch.exp(-0.5 * (steps / deviation) ** 2)
    weights = (weights / weights.sum()).tolist()
    right, down = ((steps * way - 0.5).ceil().long().to(x.device) for way in (angle.cos(), angle.sin()))
    height, width = x.shape[2:]
    images = torch.arange(len(x), device=x.device)[:, None, None, None]
    channels = torch.arange(x.shape[1], device=x.device)[None, :, None, None]
    rows, columns = torch.arange(height, device=x.device), torch.arange(width, device=x.device)
    total = torch.zeros_like(x, dtype=torch.float64)
    for i, weight in enumerate(weights):
        y = (rows + down[:, i, None]).clamp(0, height - 1)[:, None, :, None]
        total += weight * x[images, channels, y, (columns + right[:, i, None]).clamp(0, width - 1)[:, None, None]]
    return (total * 255.0).round() / 255.0


def zoomed(x: Tensor, factor: float) -> Tensor:
    """The middle of square images [n, c, h, h], enlarged to their size, linearly between the corner pixels' centres."""
    side = x.shape[-1]
    part = math.ceil(side / factor)
    first = (side - part) // 2
    size = round(part * factor)
    middle = x[..., first : first + part, first : first + part].double()
    large = F.interpolate(middle, size=(size, size), mode="bilinear", align_corners=True)
    trim = (size - side) // 2
    return large[..., trim : trim + side, trim : trim + side]


def between(x: Tensor, y: Tensor, across: Tensor, *, centred: bool) -> Tensor:
    """Values of [n, c, h, w] at rows y and columns `across`, [n, h, w] float64, linearly from the four pixels around;
    outside, the image is mirrored, `centred` on the border pixels or beyond them. float64."""
    mirror = mirrored_at_centre if centred else mirrored
    n, c, height, width = x.shape
    flat, top, left = x.double().flatten(2), y.floor(), across.floor()
    total = torch.zeros_like(flat).view(n, c, height, width)
    for down in (0, 1):
        for right in (0, 1):
            rows, columns = mirror(top.long() + down, height), mirror(left.long() + right, width)
            places = (rows * width + columns).flatten(1)[:, None].expand(-1, c, -1)
            weight = (1 - (y - top - down).abs()) * (1 - (across - left - right).abs())
            total += weight[:, None] * flat.gather(2, places).view(n, c, height, width)
    return total
