"""Accuracy on corrupted images, computed as they are needed, after Hendrycks and Dietterich (ICLR 2019).

Eight of their nineteen corruptions, at their five severities: those that need nothing but the image. The constants are
CIFAR-10-C's for images up to 64 px and ImageNet-C's for larger ones; results have 8 bits, cut as there, but are not
saved as JPEGs in between. Noise is keyed by sample, so that an image is corrupted alike wherever it is judged.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.attacks import device_keys, gaussian_noise, uniform_noise
from pipeline.evaluate.measure import hits, ranked

SMALL_SIDE = 64
Corrupt = Callable[[Tensor, Tensor, float], Tensor]
"""Images [n, c, h, w] float32 in [0, 1], one key each, and a constant -> images; those may leave [0, 1]."""


def _gaussian(x: Tensor, keys: Tensor, deviation: float) -> Tensor:
    return x + deviation * gaussian_noise(keys, x.shape[1:])


def _shot(x: Tensor, keys: Tensor, photons: float) -> Tensor:
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


def _impulse(x: Tensor, keys: Tensor, share: float) -> Tensor:
    """This share of all values becomes 0 or 1, half of them each."""
    uniform = uniform_noise(keys, x.shape[1:])
    salted = torch.where(uniform < share, 1.0, x)
    return torch.where(uniform < share / 2, 0.0, salted)


def _blur(x: Tensor, keys: Tensor, deviation: float) -> Tensor:
    """A Gaussian of four deviations to each side; the border pixels go on outside."""
    radius = int(4 * deviation + 0.5)
    places = torch.arange(-radius, radius + 1, dtype=x.dtype, device=x.device)
    weights = torch.exp(-0.5 * (places / deviation) ** 2)
    weights = (weights / weights.sum()).expand(x.shape[1], 1, -1)
    padded = F.pad(x, [radius] * 4, mode="replicate")
    rows = F.conv2d(padded, weights[..., None, :], groups=x.shape[1])
    return F.conv2d(rows, weights[..., :, None], groups=x.shape[1])


def _brightness(x: Tensor, keys: Tensor, more: float) -> Tensor:
    """Adds to the value of hue, saturation and value, which scales the other channels along; black becomes grey."""
    value = x.amax(dim=1, keepdim=True)
    raised = (value + more).clamp_max(1.0)
    return torch.where(value > 0, x * (raised / value.clamp_min(1e-6)), raised)


def _contrast(x: Tensor, keys: Tensor, share: float) -> Tensor:
    """Nearer to the mean of each channel."""
    mean = x.mean(dim=(2, 3), keepdim=True)
    return (x - mean) * share + mean


def _each(x: Tensor, change: Callable[[Image.Image], Image.Image]) -> Tensor:
    """Image by image, with 8 bits, through Pillow."""
    pixels = (x * 255.0).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    changed = np.stack([np.asarray(change(Image.fromarray(image))) for image in pixels])
    return torch.from_numpy(changed).permute(0, 3, 1, 2).to(x.device).float() / 255.0


def _pixelate(x: Tensor, keys: Tensor, share: float) -> Tensor:
    height, width = x.shape[2:]
    small = (int(width * share), int(height * share))
    box = Image.Resampling.BOX
    return _each(x, lambda image: image.resize(small, box).resize((width, height), box))


def _jpeg(x: Tensor, keys: Tensor, quality: float) -> Tensor:
    def compressed(image: Image.Image) -> Image.Image:
        stream = io.BytesIO()
        image.save(stream, "JPEG", quality=int(quality))
        return Image.open(stream)

    return _each(x, compressed)


CORRUPTIONS: dict[str, tuple[Corrupt, tuple[float, ...], tuple[float, ...]]] = {
    "gaussian_noise": (_gaussian, (0.04, 0.06, 0.08, 0.09, 0.10), (0.08, 0.12, 0.18, 0.26, 0.38)),
    "shot_noise": (_shot, (500, 250, 100, 75, 50), (60, 25, 12, 5, 3)),
    "impulse_noise": (_impulse, (0.01, 0.02, 0.03, 0.05, 0.07), (0.03, 0.06, 0.09, 0.17, 0.27)),
    "gaussian_blur": (_blur, (0.4, 0.6, 0.7, 0.8, 1), (1, 2, 3, 4, 6)),
    "brightness": (_brightness, (0.05, 0.1, 0.15, 0.2, 0.3), (0.1, 0.2, 0.3, 0.4, 0.5)),
    "contrast": (_contrast, (0.75, 0.5, 0.4, 0.3, 0.15), (0.4, 0.3, 0.2, 0.1, 0.05)),
    "pixelate": (_pixelate, (0.95, 0.9, 0.85, 0.75, 0.65), (0.6, 0.5, 0.4, 0.3, 0.25)),
    "jpeg_compression": (_jpeg, (80, 65, 58, 50, 40), (25, 18, 15, 10, 7)),
}
"""Name -> how, and the constants of severities 1 to 5: CIFAR-10-C's, ImageNet-C's."""
SEVERITIES = (1, 2, 3, 4, 5)


def corrupted(x: Tensor, ids: NDArray[np.int64], seed: int, name: str, severity: int) -> Tensor:
    """Images [n, 3, h, w] float32 in [0, 1] with 8 bits, of sample ids [n] -> the same, corrupted."""
    corrupt, small, large = CORRUPTIONS[name]
    constant = (small if x.shape[2] <= SMALL_SIDE else large)[severity - 1]
    keys = device_keys(ids, x.device, seed, "corrupt", name, severity)
    # Just below the next level is rounding, not a smaller value.
    return (corrupt(x, keys, constant).clamp(0, 1) * 255.0 + 1e-3).floor() / 255.0


@dataclass(frozen=True)
class Corrupted:
    """An image is robust if it is right clean and under all of CORRUPTIONS at all severities."""

    image_size: int
    seed: int

    @property
    def name(self) -> str:
        return "corruptions"

    @property
    def settings(self) -> dict[str, Any]:
        constants = "CIFAR-10-C" if self.image_size <= SMALL_SIDE else "ImageNet-C"
        return {"norm": None, "eps": None, "constants": constants, "corruptions": list(CORRUPTIONS)}

    @property
    def title(self) -> str:
        return f"all of {len(CORRUPTIONS)} corruptions at severities 1 to 5, constants of {self.settings['constants']}"

    @torch.no_grad()
    def judge(self, network: nn.Module, x: Tensor, y: Tensor, ids: NDArray[np.int64]) -> dict[str, Tensor]:
        clean = ranked(network(x))
        top1, top5 = hits(clean, y)
        columns = {"clean_prediction": clean[:, 0], "clean_correct": top1, "clean_top5": top5}
        robust = top1.clone()
        for name in CORRUPTIONS:
            for severity in SEVERITIES:
                right = ranked(network(corrupted(x, ids, self.seed, name, severity)))[:, 0] == y
                columns[f"right_{name}_{severity}"] = right
                robust &= right
        return columns | {"robust_correct": robust}
