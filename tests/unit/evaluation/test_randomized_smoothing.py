"""Certificates of linear networks, for which smoothed class probabilities and distances have closed forms."""

from __future__ import annotations

import math
from dataclasses import replace
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import scipy.stats
import torch
from scipy.stats import binomtest, norm
from torch import Tensor, nn

from pipeline.evaluation.measures import randomized_smoothing as module
from pipeline.evaluation.measures.base import summarise
from pipeline.evaluation.measures.randomized_smoothing import ABSTAIN, Certified, Noisy, Smoothing
from pipeline.evaluation.statistics import clopper_pearson_lower
from pipeline.models.pruning.scores import Scores
from pipeline.recipe.objective import ThreatModel
from pipeline.recipe.sections import Evaluation
from pipeline.rng import sample_keys
from pipeline.robustness.noise import derived_keys, gaussian_noise

SIDE = 4
PIXELS = 3 * SIDE * SIDE
SMOOTHING = Smoothing(sigma=0.25, n0=20, n=400, alpha=0.001, batch=128)


def keys_of(count: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(sample_keys(np.arange(count), seed, "certify").view(np.int64))


class Linear(nn.Module):
    """Class 1 on the positive side of the plane with unit normal `direction`, class 0 on the other."""

    def __init__(self, classes: int = 2) -> None:
        super().__init__()
        direction = torch.randn(PIXELS, generator=torch.Generator().manual_seed(0))
        self.direction = nn.Parameter(direction / direction.norm())
        self.classes = classes

    def distance(self, images: Tensor) -> Tensor:
        return images.flatten(1) @ self.direction

    def forward(self, images: Tensor) -> Tensor:
        logits = images.new_zeros(len(images), self.classes)
        logits[:, 1] = self.distance(images)
        return logits


class Recorder(Linear):
    def __init__(self) -> None:
        super().__init__()
        self.fed: list[Tensor] = []

    def forward(self, images: Tensor) -> Tensor:
        assert not self.training
        self.fed.append(images.clone())
        return super().forward(images)


def images_at(distances: list[float]) -> Tensor:
    """Images at these signed distances from the plane of `Linear`; class 1 is positive."""
    direction = Linear().direction.detach()
    base = torch.rand(len(distances), PIXELS, generator=torch.Generator().manual_seed(1))
    base -= (base @ direction)[:, None] * direction
    return (base + torch.tensor(distances)[:, None] * direction).view(-1, 3, SIDE, SIDE)


def test_the_radius_is_the_distance_to_the_plane_within_the_confidence() -> None:
    """For a linear network p_A = Phi(distance / sigma), so with exact p_A the radius equals the distance."""
    distances = [0.05, 0.1, 0.2, 0.3, 0.4, -0.1, -0.3]
    smoothing = replace(SMOOTHING, n=20_000, batch=1000)
    for image, key, distance in zip(images_at(distances), keys_of(7), distances, strict=True):
        certificate = module.certify(Linear(), image, key, smoothing)
        assert certificate.prediction == certificate.selected == (distance > 0)
        p = norm.cdf(abs(distance) / smoothing.sigma)
        deviation = math.sqrt(p * (1 - p) / smoothing.n)
        assert abs(certificate.votes / smoothing.n - p) < 4 * deviation
        interval = binomtest(certificate.votes, smoothing.n, alternative="greater").proportion_ci(0.999, method="exact")
        assert certificate.radius == pytest.approx(smoothing.sigma * norm.ppf(interval.low), rel=1e-6)
        lowest = smoothing.sigma * norm.ppf(p - 8 * deviation)
        assert lowest < certificate.radius < abs(distance)


def test_certificates_fail_with_at_most_the_nominal_probability() -> None:
    """The failure rate follows from the binomial: at most alpha, and not vacuously small."""
    distance, repetitions, p = 0.2, 400, norm.cdf(0.2 / 0.25)
    smoothing = replace(SMOOTHING, n0=1, n=100, alpha=0.2)
    outcomes = np.arange(smoothing.n + 1)
    above = np.array([clopper_pearson_lower(int(k), smoothing.n, smoothing.alpha) > p for k in outcomes])
    expected = (
        p * scipy.stats.binom.pmf(outcomes, smoothing.n, p)[above].sum()
    )  # p: the single selection draw is class 1
    assert 0.5 * smoothing.alpha < expected <= smoothing.alpha
    (image,) = images_at([distance])
    certificates = [module.certify(Linear(), image, key, smoothing) for key in keys_of(repetitions)]
    wrong = np.mean([certificate.radius > distance or certificate.prediction == 0 for certificate in certificates])
    assert abs(wrong - expected) < 3.5 * math.sqrt(expected * (1 - expected) / repetitions)


def test_abstains_on_the_plane() -> None:
    (image,) = images_at([0.0])
    certificates = [module.certify(Linear(), image, key, SMOOTHING) for key in keys_of(25)]
    assert {(certificate.prediction, certificate.radius) for certificate in certificates} == {(ABSTAIN, 0.0)}
    assert {certificate.selected for certificate in certificates} == {0, 1}
    assert all(150 < certificate.votes < 250 for certificate in certificates)


def test_too_few_draws_certify_nothing() -> None:
    (image,) = images_at([10.0])
    few = replace(SMOOTHING, n=9)  # alpha^(1/9) < 1/2
    assert module.certify(Linear(), image, keys_of(1)[0], few) == module.Certificate(1, 9, ABSTAIN, 0.0)
    all_agree = module.certify(Linear(), image, keys_of(1)[0], SMOOTHING)
    assert all_agree.radius == pytest.approx(0.25 * norm.ppf(0.001 ** (1 / 400)), rel=1e-9)


def test_noise_is_gaussian_unclipped_and_independent_per_draw() -> None:
    network, smoothing = Recorder(), replace(SMOOTHING, n0=30, n=300, batch=64)
    image = torch.rand(3, SIDE, SIDE, generator=torch.Generator().manual_seed(2))
    module.certify(network, image, keys_of(1)[0], smoothing)
    fed = torch.cat(network.fed)
    assert [len(batch) for batch in network.fed] == [30, 64, 64, 64, 64, 44]
    assert float(fed.min()) < -0.3
    assert float(fed.max()) > 1.3
    noise = ((fed - image) / smoothing.sigma).double().numpy()
    assert scipy.stats.kstest(noise.ravel(), norm.cdf).pvalue > 1e-3
    assert len({row.tobytes() for row in fed.numpy()}) == 330, "those that choose the class do not estimate it too"


@pytest.mark.parametrize("batch", [1, 7, 1000])
def test_noise_does_not_depend_on_the_batch_size(batch: int) -> None:
    whole, split = Recorder(), Recorder()
    (image,) = images_at([0.1])
    key = keys_of(1)[0]
    expected = module.certify(whole, image, key, SMOOTHING)
    assert module.certify(split, image, key, replace(SMOOTHING, batch=batch)) == expected
    torch.testing.assert_close(torch.cat(split.fed), torch.cat(whole.fed), rtol=0, atol=1e-5)


IDS = np.arange(100, 108)
IMAGES = torch.rand(8, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(3))
LABELS = torch.arange(8) % 3


def certify_rows(network: nn.Module, rows: list[int] | None = None, seed: int = 0) -> dict[str, Tensor]:
    rows = list(range(8)) if rows is None else rows
    measure = Certified(SMOOTHING, ThreatModel(norm="l2", eps=Fraction(1, 100)), seed)
    return measure.verdicts(network, IMAGES[rows], LABELS[rows], IDS[rows])


def masked_network() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        network = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(32, 3)
        )
    Scores.attach(network, Decimal("0.5"))
    return network.train()


def test_a_verdict_depends_on_its_image_alone() -> None:
    network = masked_network()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    whole = certify_rows(network)
    assert all(part.training for part in network.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    order = [5, 0, 7, 2]
    assert {n: column.tolist() for n, column in certify_rows(network, order).items()} == {
        name: column[order].tolist() for name, column in whole.items()
    }
    assert len(set(whole["votes"].tolist())) > 4
    assert not torch.equal(certify_rows(network, seed=1)["votes"], whole["votes"])


def test_columns_match_certify() -> None:
    network = masked_network()
    columns = {name: column.tolist() for name, column in certify_rows(network).items()}
    keys = torch.from_numpy(sample_keys(IDS, 0, "certify").view(np.int64))
    for row in range(8):
        certificate = module.certify(network, IMAGES[row], keys[row], SMOOTHING)
        right = certificate.prediction == int(LABELS[row])
        assert columns["selected_class"][row] == certificate.selected
        assert columns["votes"][row] == certificate.votes
        assert columns["clean_prediction"][row] == certificate.prediction
        assert columns["radius"][row] == certificate.radius
        assert columns["clean_correct"][row] == right
        assert columns["robust_correct"][row] == (right and certificate.radius > 0.01)
    assert any(columns["robust_correct"])


def test_settings_and_title_name_the_sampling_parameters() -> None:
    evaluation = Evaluation(n0=7, n=90, alpha=0.01, noise_batch=5)
    measure = Certified.of(0.5, ThreatModel(norm="l2", eps=Fraction(1, 4)), evaluation, 3)
    draws = {"sigma": 0.5, "n0": 7, "n": 90, "alpha": 0.01, "batch": 5}
    assert measure.settings == {"norm": "l2", "eps": "1/4", **draws}
    assert measure.title == "certified at l2 radius 1/4 by randomized smoothing (sigma 0.5, N = 90, alpha 0.01)"


def test_a_vote_over_noisy_copies_is_the_most_frequent_prediction() -> None:
    x, ids = images_at([0.3, -0.3, 0.0, 0.0]), np.arange(4)
    y = torch.tensor([1, 1, 1, 0])
    columns = Noisy(0.25, 25, 0).verdicts(Linear(), x, y, ids)
    keys = torch.from_numpy(sample_keys(ids, 0, "noisy").view(np.int64))
    draws = derived_keys(keys, torch.arange(25))
    noise = [gaussian_noise(draws[i], x[i].shape) for i in range(4)]
    votes = [int((Linear().distance(x[i] + 0.25 * noise[i]) > 0).sum()) for i in range(4)]
    assert columns["robust_correct"].tolist() == [(count > 12) == bool(y[i]) for i, count in enumerate(votes)]
    assert columns["clean_correct"].tolist()[:2] == [True, False]


VERDICTS = {
    "sample_id": np.arange(5),
    "label": np.array([0, 1, 2, 2, 1]),
    "clean_prediction": np.array([0, 1, ABSTAIN, 1, 1]),
    "radius": np.array([0.1, 0.25, 0.0, 0.9, 0.4]),
    "clean_correct": np.array([True, True, False, False, True]),
    "robust_correct": np.array([False, True, False, False, True]),
}


def test_summary() -> None:
    summary = summarise(VERDICTS)
    assert (summary["images"], summary["clean_correct"], summary["robust_correct"]) == (5, 3, 2)
    assert summary["clean_accuracy"]["value"] == 0.6
    assert summary["robust_accuracy"]["value"] == 0.4
    assert summary["abstained"] == 1
    assert summary["mean_certified_radius"] == pytest.approx((0.1 + 0.25 + 0.4) / 5)
