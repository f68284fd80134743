"""Certified accuracy by randomized smoothing, with the protocol of Cohen et al. (ICML 2019, section 3.2).

The smoothed network answers the class that the network most often answers for x + N(0, sigma^2 I). Sampling bounds how
often from below, and the bound proves a radius in l2 in which the answer stays the same. Distances are in pixels, over
all channels of what the network is fed. Noisy images are not clipped to [0, 1].

An image goes through alone, `batch` noises at a time, and draw j of image i has a stream of random numbers of its own.
So a verdict depends on neither the other images nor who judges it; on the size of the batches only through rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import binomtest, norm
from torch import Tensor, nn

from pipeline.attacks import crafting, derived_keys, gaussian_noise
from pipeline.data.loader import Batch
from pipeline.evaluate.pgd import Verdicts
from pipeline.evaluate.statistics import clopper_pearson_lower, wilson_interval
from pipeline.keys import sample_keys

ABSTAIN = -1
"""The class of an image for which nothing is answered."""


@dataclass(frozen=True)
class Smoothing:
    """How a smoothed network is sampled."""

    sigma: float
    n0: int
    """Draws that choose the class."""
    n: int
    """Draws, others, that bound how probable this class is."""
    alpha: float
    """How probable a wrong certificate may be, per image."""
    batch: int
    """Draws in one forward."""

    @property
    def largest_radius(self) -> float:
        """The radius that is certified when all n draws agree."""
        return _radius(self.n, self)


@dataclass(frozen=True)
class Certificate:
    """What was found for one image."""

    selected: int
    """The class that the first n0 draws chose."""
    votes: int
    """How many of the n draws went to that class."""
    prediction: int
    """The selected class, or ABSTAIN if it was not shown to have more than half of the probability."""
    radius: float
    """With probability 1 - alpha the smoothed network answers the prediction nearer than this; 0 when abstaining."""


def _radius(votes: int, smoothing: Smoothing) -> float:
    """sigma * Phi^-1(lower bound of p_A) (Cohen et al., section 3.2.2), 0 where that proves nothing."""
    lower = clopper_pearson_lower(votes, smoothing.n, smoothing.alpha)
    return smoothing.sigma * float(norm.ppf(lower)) if lower > 0.5 else 0.0


@torch.no_grad()
def _count(network: nn.Module, image: Tensor, key: Tensor, draws: range, smoothing: Smoothing) -> NDArray[np.int64]:
    """How often the network answers each class for image + noise, over these draws: [classes] int64."""
    votes: list[Tensor] = []
    with crafting(network):
        for first in range(draws.start, draws.stop, smoothing.batch):
            numbers = torch.arange(first, min(first + smoothing.batch, draws.stop), device=image.device)
            noise = gaussian_noise(derived_keys(key.view(1), numbers).view(-1), image.shape)
            logits = network(image + smoothing.sigma * noise)
            classes = torch.arange(logits.shape[1], device=logits.device)
            votes.append((logits.argmax(dim=1, keepdim=True) == classes).sum(dim=0))
    return torch.stack(votes).sum(dim=0).cpu().numpy()


def certify(network: nn.Module, image: Tensor, key: Tensor, smoothing: Smoothing) -> Certificate:
    """CERTIFY (Cohen et al., section 3.2.2): a class and the radius around `image` in which it is the answer.

    `image` [c, h, w] float32 in [0, 1] and `key`, one int64, lie on the network's device. The network is put in eval
    mode and restored. In at most alpha of all cases, over the noise, the radius is too large.
    """
    n0, n = smoothing.n0, smoothing.n
    selected = int(_count(network, image, key, range(n0), smoothing).argmax())
    votes = int(_count(network, image, key, range(n0, n0 + n), smoothing)[selected])
    radius = _radius(votes, smoothing)
    return Certificate(selected, votes, selected if radius > 0 else ABSTAIN, radius)


def predict(network: nn.Module, image: Tensor, key: Tensor, smoothing: Smoothing) -> int:
    """PREDICT (Cohen et al., section 3.2.1): the smoothed network's class, from n draws, or ABSTAIN.

    Arguments as for `certify`. The class is wrong with probability alpha at most: the two most frequent classes are
    told apart by a two-sided binomial test.
    """
    counts = _count(network, image, key, range(smoothing.n), smoothing)
    first, second = np.argsort(-counts, kind="stable")[:2]
    p_value = binomtest(int(counts[first]), int(counts[first] + counts[second]), 0.5).pvalue
    return int(first) if p_value <= smoothing.alpha else ABSTAIN


def judge(network: nn.Module, batch: Batch, smoothing: Smoothing, seed: int, device: torch.device) -> Verdicts:
    """Certificates of a batch of images, in its order, as columns; noise is keyed by (seed, sample id, draw).

    sample_id, label, selected_class, votes and smoothed_prediction are int64, radius is float64, smoothed_correct bool.
    """
    images = batch.images.to(device).float().div(255.0)
    keys = torch.from_numpy(sample_keys(batch.ids.numpy(), seed, "certify").view(np.int64)).to(device)
    found = [certify(network, image, key, smoothing) for image, key in zip(images, keys, strict=True)]
    labels = batch.labels.numpy()
    predictions = np.array([certificate.prediction for certificate in found], np.int64)
    return {
        "sample_id": batch.ids.numpy(),
        "label": labels,
        "selected_class": np.array([certificate.selected for certificate in found], np.int64),
        "votes": np.array([certificate.votes for certificate in found], np.int64),
        "smoothed_prediction": predictions,
        "radius": np.array([certificate.radius for certificate in found], np.float64),
        "smoothed_correct": predictions == labels,
    }


def certified(verdicts: Verdicts, radius: float) -> NDArray[np.bool_]:
    """Which images are right, provably so for every perturbation of l2 norm <= radius; abstaining is not right."""
    return verdicts["smoothed_correct"] & (verdicts["radius"] > radius)


def certified_accuracy(verdicts: Verdicts, radius: float) -> dict[str, float]:
    """The share of images that are `certified` at the radius: value, and its 95 % Wilson interval low, high."""
    right = certified(verdicts, radius)
    low, high = wilson_interval(int(right.sum()), len(right))
    return {"value": float(right.mean()), "low": low, "high": high}


def certified_curve(verdicts: Verdicts, radii: Sequence[float]) -> dict[str, list[float]]:
    """Certified accuracy against radius, as columns: radius, accuracy, low, high."""
    points = [certified_accuracy(verdicts, radius) for radius in radii]
    return {
        "radius": list(radii),
        "accuracy": [point["value"] for point in points],
        "low": [point["low"] for point in points],
        "high": [point["high"] for point in points],
    }


def summarise(verdicts: Verdicts, radius: float) -> dict[str, Any]:
    """Exact counts and 95 % Wilson intervals for result files, certified at `radius`.

    mean_certified_radius is over all images; one that is not right counts as 0 (Zhai et al., ICLR 2020, "ACR").
    """
    total, right = len(verdicts["sample_id"]), verdicts["smoothed_correct"]
    return {
        "images": total,
        "smoothed_correct": int(right.sum()),
        "smoothed_accuracy": certified_accuracy(verdicts, 0.0),
        "certified_correct": int(certified(verdicts, radius).sum()),
        "certified_accuracy": certified_accuracy(verdicts, radius),
        "abstained": int((verdicts["smoothed_prediction"] == ABSTAIN).sum()),
        "mean_certified_radius": float(np.where(right, verdicts["radius"], 0.0).mean()),
    }
