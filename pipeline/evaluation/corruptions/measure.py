"""Accuracy under common corruptions, generated on the fly (Hendrycks and Dietterich, ICLR 2019).

Eighteen of the nineteen corruptions at all five severities; `weather` explains why frost is missing. The constants are
CIFAR-10-C's for images up to 64 px and ImageNet-C's for larger ones. They are meant for 32 and 224 px, and lengths in
pixels are not rescaled for other sizes. Results are truncated to 8 bits as in the originals, but not saved as JPEGs.
Noise is keyed by sample, so an image is corrupted identically on every worker.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pipeline.evaluation.corruptions import blurs, digital, noises, weather
from pipeline.evaluation.corruptions.resampling import quantise
from pipeline.evaluation.measures.base import hits, ranked
from pipeline.robustness.noise import device_keys

SMALL_SIDE = 64
Corrupt = Callable[[Tensor, Tensor, Any], Tensor]
"""Images [n, 3, h, h] float32 in [0, 1], keys [n], constant -> images, which may leave [0, 1]."""
Constants = tuple[Any, Any, Any, Any, Any]
"""Of severity 1 to 5."""


def _factors(first: tuple[float, float], *others: tuple[float, float]) -> Constants:
    """Zoom factors from 1 up to (end, step), by np.arange as in the original, whose rounding may include the end."""
    factors = [tuple(np.arange(1, end, step).tolist()) for end, step in (first, *others)]
    return factors[0], factors[1], factors[2], factors[3], factors[4]


CORRUPTIONS: dict[str, tuple[Corrupt, Constants, Constants]] = {
    "gaussian_noise": (noises.gaussian, (0.04, 0.06, 0.08, 0.09, 0.10), (0.08, 0.12, 0.18, 0.26, 0.38)),
    "shot_noise": (noises.shot, (500, 250, 100, 75, 50), (60, 25, 12, 5, 3)),
    "impulse_noise": (noises.impulse, (0.01, 0.02, 0.03, 0.05, 0.07), (0.03, 0.06, 0.09, 0.17, 0.27)),
    "defocus_blur": (
        blurs.defocus,
        ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),
        ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)),
    ),
    "glass_blur": (
        blurs.glass,
        ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)),
        ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)),
    ),
    "motion_blur": (
        blurs.motion,
        ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)),
        ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15)),
    ),
    "zoom_blur": (
        blurs.zoom,
        _factors((1.06, 0.01), (1.11, 0.01), (1.16, 0.01), (1.21, 0.01), (1.26, 0.01)),
        _factors((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03)),
    ),
    "snow": (
        weather.snow,
        (
            (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
            (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
            (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
            (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
            (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
        ),
        (
            (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
            (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
            (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
            (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
            (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
        ),
    ),
    "fog": (
        weather.fog,
        ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)),
        ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)),
    ),
    "brightness": (digital.brightness, (0.05, 0.1, 0.15, 0.2, 0.3), (0.1, 0.2, 0.3, 0.4, 0.5)),
    "contrast": (digital.contrast, (0.75, 0.5, 0.4, 0.3, 0.15), (0.4, 0.3, 0.2, 0.1, 0.05)),
    "elastic_transform": (
        digital.elastic,
        ((0, 0, 2.56), (1.6, 6.4, 2.24), (2.56, 1.92, 1.92), (3.2, 1.28, 1.6), (3.2, 0.96, 0.96)),
        ((488, 170.8, 24.4), (488, 19.52, 48.8), (12.2, 2.44, 4.88), (17.08, 2.44, 4.88), (29.28, 2.44, 4.88)),
    ),
    "pixelate": (digital.pixelate, (0.95, 0.9, 0.85, 0.75, 0.65), (0.6, 0.5, 0.4, 0.3, 0.25)),
    "jpeg_compression": (digital.jpeg, (80, 65, 58, 50, 40), (25, 18, 15, 10, 7)),
    "speckle_noise": (noises.speckle, (0.06, 0.1, 0.12, 0.16, 0.2), (0.15, 0.2, 0.35, 0.45, 0.6)),
    "gaussian_blur": (blurs.gaussian, (0.4, 0.6, 0.7, 0.8, 1), (1, 2, 3, 4, 6)),
    "spatter": (
        weather.spatter,
        (
            (0.62, 0.1, 0.7, 0.7, 0.5, 0),
            (0.65, 0.1, 0.8, 0.7, 0.5, 0),
            (0.65, 0.3, 1, 0.69, 0.5, 0),
            (0.65, 0.1, 0.7, 0.69, 0.6, 1),
            (0.65, 0.1, 0.5, 0.68, 0.6, 1),
        ),
        (
            (0.65, 0.3, 4, 0.69, 0.6, 0),
            (0.65, 0.3, 3, 0.68, 0.6, 0),
            (0.65, 0.3, 2, 0.68, 0.5, 0),
            (0.65, 0.3, 1, 0.65, 1.5, 1),
            (0.67, 0.4, 1, 0.65, 1.5, 1),
        ),
    ),
    "saturate": (
        digital.saturate,
        ((0.3, 0), (0.1, 0), (1.5, 0), (2, 0.1), (2.5, 0.2)),
        ((0.3, 0), (0.1, 0), (2, 0), (5, 0.1), (20, 0.2)),
    ),
}
"""Name -> function, CIFAR-10-C's constants, ImageNet-C's constants."""
EXTRA = ("speckle_noise", "gaussian_blur", "spatter", "saturate")
"""Held out by the authors for tuning; excluded from all means."""
SEVERITIES = (1, 2, 3, 4, 5)


def corrupted(x: Tensor, ids: NDArray[np.int64], seed: int, name: str, severity: int) -> Tensor:
    """Corrupt 8-bit images [n, 3, h, h] float32 in [0, 1] of sample ids [n]; shape and dtype are kept."""
    corruption, small, large = CORRUPTIONS[name]
    constant = (small if x.shape[2] <= SMALL_SIDE else large)[severity - 1]
    keys = device_keys(ids, x.device, seed, "corrupt", name, severity)
    return quantise(corruption(x, keys, constant)).float()


@dataclass(frozen=True)
class Corrupted:
    """An image is robust if it is classified correctly clean and under all CORRUPTIONS at all severities."""

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

    @property
    def passes(self) -> int:
        """Forward passes per chunk."""
        return 1 + len(CORRUPTIONS) * len(SEVERITIES)

    @torch.no_grad()
    def verdicts(self, network: nn.Module, x: Tensor, y: Tensor, ids: NDArray[np.int64]) -> dict[str, Tensor]:
        """Adds columns right_<corruption>_<severity>, or extra_ for EXTRA."""
        clean = ranked(network(x))
        top1, top5 = hits(clean, y)
        columns = {"clean_prediction": clean[:, 0], "clean_correct": top1, "clean_top5": top5}
        robust = top1.clone()
        for name in CORRUPTIONS:
            for severity in SEVERITIES:
                is_correct = ranked(network(corrupted(x, ids, self.seed, name, severity)))[:, 0] == y
                columns[f"{'extra' if name in EXTRA else 'right'}_{name}_{severity}"] = is_correct
                robust &= is_correct
        return columns | {"robust_correct": robust}
