"""Certified accuracy by randomized smoothing, with the protocol of Cohen et al. (ICML 2019, section 3.2).

The smoothed network answers the class that the network most often answers for x + N(0, sigma^2 I). Sampling bounds how
often from below, and the bound proves a radius in l2 in which the answer stays the same. Distances are in pixels, over
all channels of what the network is fed. Noisy images are not clipped to [0, 1].

An image goes through alone, `batch` noises at a time, and draw j of image i has a stream of random numbers of its own.
So a verdict depends on neither the other images nor the worker; on the size of the batches only through rounding.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import ndtri
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.evaluation.measures.base import ranked
from pipeline.evaluation.statistics import clopper_pearson_lower
from pipeline.recipe.objective import ThreatModel
from pipeline.recipe.sections import Evaluation
from pipeline.robustness.attacks import crafting
from pipeline.robustness.noise import derived_keys, device_keys, gaussian_noise

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
    return smoothing.sigma * float(ndtri(lower)) if lower > 0.5 else 0.0


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


@dataclass(frozen=True)
class Certified:
    """Certificates as a measure: an image is robust if it is right for every perturbation of l2 norm <= eps."""

    smoothing: Smoothing
    threat_model: ThreatModel
    seed: int

    @staticmethod
    def of(sigma: float, threat_model: ThreatModel, evaluation: Evaluation, seed: int) -> Certified:
        draws = (evaluation.n0, evaluation.n, evaluation.alpha, evaluation.noise_batch)
        return Certified(Smoothing(sigma, *draws), threat_model, seed)

    @property
    def name(self) -> str:
        return "certified"

    @property
    def settings(self) -> dict[str, Any]:
        return {"norm": "l2", "eps": str(self.threat_model.eps), **asdict(self.smoothing)}

    @property
    def title(self) -> str:
        sampling = f"sigma {self.smoothing.sigma:g}, N = {self.smoothing.n:,}, alpha {self.smoothing.alpha:g}"
        return f"certified at l2 radius {self.threat_model.eps} by randomized smoothing ({sampling})"

    def verdicts(self, network: nn.Module, x: Tensor, y: Tensor, ids: NDArray[np.int64]) -> dict[str, Tensor]:
        keys = device_keys(ids, x.device, self.seed, "certify")
        found = [certify(network, image, key, self.smoothing) for image, key in zip(x, keys, strict=True)]
        predictions = torch.tensor([certificate.prediction for certificate in found])
        radii = torch.tensor([certificate.radius for certificate in found], dtype=torch.float64)
        right = predictions == y.cpu()
        return {
            "selected_class": torch.tensor([certificate.selected for certificate in found]),
            "votes": torch.tensor([certificate.votes for certificate in found]),
            "clean_prediction": predictions,
            "clean_correct": right,
            "radius": radii,
            "robust_correct": right & (radii > float(self.threat_model.eps)),
        }


@dataclass(frozen=True)
class Noisy:
    """A cheap measure of a smoothed network while it trains: robust is right in a vote over a few noisy copies."""

    sigma: float
    draws: int
    seed: int

    @property
    def name(self) -> str:
        return "noisy"

    @property
    def settings(self) -> dict[str, Any]:
        return {"norm": None, "eps": None, "sigma": self.sigma, "draws": self.draws}

    @property
    def title(self) -> str:
        return f"vote over {self.draws} draws of noise, sigma {self.sigma:g}"

    @torch.no_grad()
    def verdicts(self, network: nn.Module, x: Tensor, y: Tensor, ids: NDArray[np.int64]) -> dict[str, Tensor]:
        keys = device_keys(ids, x.device, self.seed, "noisy")
        votes = torch.zeros(0)
        for draw in range(self.draws):
            number = torch.tensor([draw], device=x.device)
            noise = gaussian_noise(derived_keys(keys, number).view(-1), x.shape[1:])
            logits = network(x + self.sigma * noise)
            answers = F.one_hot(logits.argmax(dim=1), logits.shape[1])
            votes = votes + answers if draw else answers
        clean, voted = ranked(network(x))[:, 0], ranked(votes)[:, 0]
        return {"clean_prediction": clean, "clean_correct": clean == y, "robust_correct": voted == y}
