"""Certified accuracy by randomized smoothing, with the protocol of Cohen et al. (ICML 2019, section 3.2).

The smoothed network predicts the most likely class of the base network on x + N(0, sigma^2 I). Sampling gives a lower
bound on that class's probability, and the bound certifies an l2 radius in which the prediction is constant. Distances
are in [0, 1] pixel values over all channels of the network's input. Noisy images are not clipped to [0, 1].

Images are certified one at a time, with `batch` draws per forward pass, and draw j of image i has its own random
stream. A verdict thus depends on neither the other images nor the worker, and on the batch size only through rounding.
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
"""The prediction for an image on which the smoothed network abstains."""


@dataclass(frozen=True)
class Smoothing:
    """Sampling parameters of a smoothed network."""

    sigma: float
    n0: int
    """Draws for selecting the class."""
    n: int
    """Further, independent draws for bounding its probability."""
    alpha: float
    """Failure probability of a certificate, per image."""
    batch: int
    """Draws per forward pass."""


@dataclass(frozen=True)
class Certificate:
    """The result of CERTIFY for one image."""

    selected: int
    """The top class of the first n0 draws."""
    votes: int
    """Number of the n draws classified as `selected`."""
    prediction: int
    """The selected class, or ABSTAIN if the lower bound on its probability is at most 1/2."""
    radius: float
    """With confidence 1 - alpha, the prediction is constant in the open l2 ball of this radius; 0 when abstaining."""


def _radius(votes: int, smoothing: Smoothing) -> float:
    """sigma * Phi^-1(lower bound of p_A) (Cohen et al., section 3.2.2), or 0 if the bound is at most 1/2."""
    lower = clopper_pearson_lower(votes, smoothing.n, smoothing.alpha)
    return smoothing.sigma * float(ndtri(lower)) if lower > 0.5 else 0.0


@torch.no_grad()
def _count(network: nn.Module, image: Tensor, key: Tensor, draws: range, smoothing: Smoothing) -> NDArray[np.int64]:
    """Predicted classes of image + noise over these draws, as counts: [classes] int64."""
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
    """CERTIFY (Cohen et al., section 3.2.2): a class, and the radius around `image` in which it is predicted.

    `image` [c, h, w] float32 in [0, 1] and `key`, one int64, lie on the network's device. The network is put in eval
    mode and restored. Over the noise, the radius is too large with probability at most alpha.
    """
    n0, n = smoothing.n0, smoothing.n
    selected = int(_count(network, image, key, range(n0), smoothing).argmax())
    votes = int(_count(network, image, key, range(n0, n0 + n), smoothing)[selected])
    radius = _radius(votes, smoothing)
    return Certificate(selected, votes, selected if radius > 0 else ABSTAIN, radius)


@dataclass(frozen=True)
class Certified:
    """Certificates as a measure: an image is robust if its label is certified for l2 perturbations of norm <= eps."""

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
        certificates = [certify(network, image, key, self.smoothing) for image, key in zip(x, keys, strict=True)]
        predictions = torch.tensor([certificate.prediction for certificate in certificates])
        radii = torch.tensor([certificate.radius for certificate in certificates], dtype=torch.float64)
        is_correct = predictions == y.cpu()
        return {
            "selected_class": torch.tensor([certificate.selected for certificate in certificates]),
            "votes": torch.tensor([certificate.votes for certificate in certificates]),
            "clean_prediction": predictions,
            "clean_correct": is_correct,
            "radius": radii,
            "robust_correct": is_correct & (radii > float(self.threat_model.eps)),
        }


@dataclass(frozen=True)
class Noisy:
    """A cheap proxy while a smoothed network trains: robust is a correct majority vote over a few noisy copies."""

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
            ballots = F.one_hot(logits.argmax(dim=1), logits.shape[1])
            votes = votes + ballots if draw else ballots
        clean, voted = ranked(network(x))[:, 0], ranked(votes)[:, 0]
        return {"clean_prediction": clean, "clean_correct": clean == y, "robust_correct": voted == y}
