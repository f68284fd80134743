"""Attacks against those of Foolbox (Rauber et al., JOSS 2020), which shares no code with this project or AutoAttack."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pipeline.evaluation.measures.autoattack import Ensemble
from pipeline.evaluation.measures.pgd import Pgd
from pipeline.evaluation.statistics import mcnemar
from pipeline.recipe.objective import ThreatModel
from tests.support.synthetic_data import BALLS, CLASSES, draw, trained_network

with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
    from foolbox import attacks  # imports a scipy module by its deprecated name
    from foolbox.attacks.deepfool import L2DeepFoolAttack, LinfDeepFoolAttack
    from foolbox.models.pytorch import PyTorchModel

COUNT = 400
IDS = np.arange(COUNT)
TOLERANCE = 0.01
"""Between the robust accuracies of AutoAttack and of Foolbox's PGD and DeepFool combined."""


@pytest.fixture(scope="module")
def network() -> nn.Module:
    return trained_network()


@pytest.fixture(scope="module")
def images() -> tuple[Tensor, Tensor]:
    return draw(COUNT, seed=1000)


def robust_images(network: nn.Module, images: tuple[Tensor, Tensor], eps: float, *theirs: Any) -> NDArray[np.bool_]:
    """Which images are classified correctly, also under each of their attacks."""
    with torch.random.fork_rng([]):
        torch.manual_seed(5)
        model = PyTorchModel(network, bounds=(0, 1), device="cpu")
        broken = torch.stack([attack(model, *images, epsilons=eps)[2] for attack in theirs])
    return ~broken.any(dim=0).numpy()


@pytest.mark.parametrize("steps", [3, 20])
@pytest.mark.parametrize("threat", BALLS.values(), ids=BALLS)
def test_pgd_is_within_noise_of_theirs(
    network: nn.Module, images: tuple[Tensor, Tensor], threat: ThreatModel, steps: int
) -> None:
    """Same loss and steps, and a uniform start in the ball, which matters for three steps. Random numbers differ."""
    eps = float(threat.eps)
    ours = Pgd(threat, steps, eps / 4, restarts=1, seed=3).verdicts(network, *images, IDS)["robust_correct"].numpy()
    kind = attacks.LinfPGD if threat.norm == "linf" else attacks.L2PGD
    theirs = robust_images(network, images, eps, kind(abs_stepsize=eps / 4, steps=steps, random_start=True))
    comparison = mcnemar(ours, theirs)
    assert 0.1 < ours.mean() < 0.8, "the attack must neither fail nor break everything"
    assert comparison.p_value > 0.05, comparison
    if steps == 3:
        centred = robust_images(network, images, eps, kind(abs_stepsize=eps / 4, steps=steps, random_start=False))
        assert mcnemar(ours, centred).p_value < 0.001, "the test must distinguish a different attack"


@pytest.mark.parametrize("threat", BALLS.values(), ids=BALLS)
def test_autoattack_agrees_with_their_robust_accuracy(
    network: nn.Module, images: tuple[Tensor, Tensor], threat: ThreatModel
) -> None:
    eps = float(threat.eps)
    ensemble = Ensemble("autoattack", threat, CLASSES, seed=3, iterations=20, queries=100)
    ours = ensemble.verdicts(network, *images, IDS)["robust_correct"].numpy()
    linf = threat.norm == "linf"
    pgd, nearest = (attacks.LinfPGD, LinfDeepFoolAttack) if linf else (attacks.L2PGD, L2DeepFoolAttack)
    theirs = robust_images(network, images, eps, pgd(abs_stepsize=eps / 10, steps=100), nearest())
    assert 0.05 < ours.mean() < 0.5
    assert abs(ours.mean() - theirs.mean()) <= TOLERANCE, (ours.mean(), theirs.mean())
