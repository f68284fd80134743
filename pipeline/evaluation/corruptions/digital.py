"""Digital corruptions, as Hendrycks and Dietterich define them: brightness, contrast, saturation, elastic transform,
pixelation, JPEG."""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pipeline.evaluation.corruptions.resampling import gaussian_filter, sample_bilinear, split_keys
from pipeline.robustness.noise import uniform_noise


def brightness(x: Tensor, keys: Tensor, more: float) -> Tensor:
    """Adds to the value channel of HSV, which scales all of RGB; black becomes grey."""
    value = x.amax(dim=1, keepdim=True)
    raised = (value + more).clamp_max(1.0)
    return torch.where(value > 0, x * (raised / value.clamp_min(1e-6)), raised)


def saturate(x: Tensor, keys: Tensor, constant: tuple[float, float]) -> Tensor:
    """Scales and shifts the saturation channel of HSV; greys have the hue of red."""
    times, more = constant
    value = x.double().amax(dim=1, keepdim=True)
    lack = value - x
    largest = lack.amax(dim=1, keepdim=True)
    saturation = largest / value.clamp_min(1e-6)
    target = (saturation * times + more).clamp(0, 1)
    red = torch.tensor([0.0, 1.0, 1.0], dtype=torch.float64, device=x.device).view(-1, 1, 1)
    share = torch.where(largest > 0, lack / largest.clamp_min(1e-6), red)
    return value * (1 - target * share)


def contrast(x: Tensor, keys: Tensor, share: float) -> Tensor:
    """Scales the distance from each channel's mean by `share`."""
    mean = x.mean(dim=(2, 3), keepdim=True)
    return (x - mean) * share + mean


def elastic(x: Tensor, keys: Tensor, constant: tuple[float, float, float]) -> Tensor:
    """A random affine map that moves three points, then a displacement of every pixel by smooth noise."""
    amount, deviation, most = constant
    points, downwards, sideways = split_keys(keys, 3)
    height, width = x.shape[2:]
    square = min(height, width) // 3
    middle = torch.tensor([height // 2, width // 2], dtype=torch.float64)
    before = middle + square * torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
    after = before + most * (2 * uniform_noise(points, (3, 2)).cpu().double() - 1)
    # The inverse map, from `after` to `before`, gives each output pixel's source; x comes before y.
    back = torch.linalg.solve(torch.cat([after, torch.ones(len(x), 3, 1).double()], dim=2), before).to(x.device)
    rows, columns = (torch.arange(side, dtype=torch.float64, device=x.device) for side in (height, width))
    rows, columns = torch.meshgrid(rows, columns, indexing="ij")
    across, down = (torch.stack([columns, rows, torch.ones_like(rows)], dim=-1) @ back[:, None]).unbind(-1)
    x = sample_bilinear(x, down, across, centred=True)
    if not amount:
        return x
    noise = [2 * uniform_noise(stream, (height, width)).double() - 1 for stream in (downwards, sideways)]
    down, across = (amount * gaussian_filter(one, deviation, truncate=3.0, mirror=True) for one in noise)
    return sample_bilinear(x, rows + down, columns + across, centred=False)


def _map_pillow(x: Tensor, change: Callable[[Image.Image], Image.Image]) -> Tensor:
    """Apply `change` to each image as an 8-bit Pillow image."""
    pixels = (x * 255.0).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    results = np.stack([np.asarray(change(Image.fromarray(image))) for image in pixels])
    return torch.from_numpy(results).permute(0, 3, 1, 2).to(x.device).float() / 255.0


def pixelate(x: Tensor, keys: Tensor, share: float) -> Tensor:
    height, width = x.shape[2:]
    small = (int(width * share), int(height * share))
    box = Image.Resampling.BOX
    return _map_pillow(x, lambda image: image.resize(small, box).resize((width, height), box))


def jpeg(x: Tensor, keys: Tensor, quality: float) -> Tensor:
    def recompress(image: Image.Image) -> Image.Image:
        stream = io.BytesIO()
        image.save(stream, "JPEG", quality=int(quality))
        return Image.open(stream)

    return _map_pillow(x, recompress)
