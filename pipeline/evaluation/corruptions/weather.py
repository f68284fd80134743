"""Weather and lens corruptions, as Hendrycks and Dietterich define them: snow, fog and spatter.

Frost is missing: it blends in photographs of frosted glass, which are not part of this project, and a substitute would
be a different corruption under the same name.
"""

from __future__ import annotations

import math

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.evaluation.corruptions.resampling import gaussian_filter, motion_blur, quantise, split_keys, zoom_centre
from pipeline.robustness.noise import gaussian_noise, uniform_noise

GREY = (0.299, 0.587, 0.114)
SNOW_ANGLES = (-135.0, -45.0)
LARGEST_WOBBLE = 100.0
WATER, MUD = (175, 238, 238), (63, 42, 20)
"""RGB of 255: pale turquoise and brown."""
RELIEF = np.array([[-2, -1, 0], [-1, 1, 1], [0, 1, 2]])


def snow(x: Tensor, keys: Tensor, constant: tuple[float, float, float, float, int, float, float]) -> Tensor:
    """Motion-blurred flakes and a copy of them rotated by 180 degrees, over a paler image."""
    mean, deviation, factor, least, radius, spread, share = constant
    flakes, wind = split_keys(keys, 2)
    layer = zoom_centre(mean + deviation * gaussian_noise(flakes, (1, *x.shape[2:])), factor)
    layer = motion_blur(quantise(torch.where(layer < least, 0.0, layer)), wind, radius, spread, SNOW_ANGLES)
    grey = torch.einsum("nchw,c->nhw", x.double(), x.new_tensor(GREY, dtype=torch.float64))[:, None]
    pale = share * x + (1 - share) * torch.maximum(x.double(), grey * 1.5 + 0.5)
    return pale + layer + layer.flip(2, 3)


def fog(x: Tensor, keys: Tensor, constant: tuple[float, float]) -> Tensor:
    """Adds clouds and rescales to the image's original maximum."""
    amount, decay = constant
    side = max(x.shape[2:])
    clouds = _plasma(keys, 1 << math.ceil(math.log2(side)), decay)[:, None, : x.shape[2], : x.shape[3]]
    brightest = x.double().amax(dim=(1, 2, 3), keepdim=True)
    return (x + amount * clouds) * brightest / (brightest + amount)


def _plasma(keys: Tensor, side: int, decay: float) -> Tensor:
    """Plasma clouds by the diamond-square algorithm on a torus, [n, side, side] in [0, 1]; `side` is a power of two.

    Each round sets the midpoint of every square, then of every diamond, to the mean of its four corners plus uniform
    noise of up to wobble^2; wobble is divided by `decay` after each round.
    """
    numbers = uniform_noise(keys, (side * side - 1,)).double() * 2 - 1
    field = torch.zeros(len(keys), side, side, dtype=torch.float64, device=keys.device)
    step, wobble, used = side, LARGEST_WOBBLE, 0

    def midpoints(corner_sum: Tensor) -> Tensor:
        nonlocal used
        count = corner_sum[0].numel()
        noise = numbers[:, used : used + count].view_as(corner_sum)
        used += count
        return corner_sum / 4 + wobble**2 * noise

    while step >= 2:
        half = step // 2
        corners = field[:, ::step, ::step].clone()
        pairs = corners + corners.roll(-1, 1)
        centres = midpoints(pairs + pairs.roll(-1, 2))
        field[:, half::step, half::step] = centres
        field[:, ::step, half::step] = midpoints(centres + centres.roll(1, 1) + corners + corners.roll(-1, 2))
        field[:, half::step, ::step] = midpoints(centres + centres.roll(1, 2) + corners + corners.roll(-1, 1))
        step, wobble = half, wobble / decay
    field -= field.amin(dim=(1, 2), keepdim=True)
    return field / field.amax(dim=(1, 2), keepdim=True)


def spatter(x: Tensor, keys: Tensor, constant: tuple[float, float, float, float, float, int]) -> Tensor:
    """Drops of water or mud on the lens."""
    mean, deviation, spread, least, amount, is_mud = constant
    liquid = gaussian_filter(mean + deviation * gaussian_noise(keys, x.shape[2:]), spread)
    liquid = torch.where(liquid < least, 0.0, liquid)
    colour = torch.tensor(MUD if is_mud else WATER, device=x.device).view(-1, 1, 1) / 255.0
    if is_mud:
        cover = gaussian_filter((liquid > least).double(), amount)[:, None]
        cover = torch.where(cover < 0.8, 0.0, cover)
        return x * (1 - cover) + colour * cover
    pixels = (liquid.clamp(0, 1) * 255.0).byte().cpu().numpy()
    shine = torch.from_numpy(np.stack([_shine(drops) for drops in pixels])).to(x.device)[:, None]
    return x + amount * shine * colour


def _shine(drops: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Reflected light of drops [h, w], in [0, 1]: an emboss filter on the distance from their edges."""
    distance = cv2.distanceTransform(255 - cv2.Canny(drops, 50, 150), cv2.DIST_L2, 5)
    distance = cv2.blur(np.minimum(distance, 20), (3, 3)).astype(np.uint8)
    relief = cv2.blur(cv2.filter2D(cv2.equalizeHist(distance), cv2.CV_8U, RELIEF), (3, 3))
    shine = drops * relief.astype(np.float32)
    return shine / max(float(shine.max()), 1.0)  # all zero without drops
