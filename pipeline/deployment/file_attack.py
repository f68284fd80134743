"""Robust accuracy of an exported file: worst case per image over attacks on the file and on its network.

Attacks in their order, each on the images that the file still classifies correctly (Carlini et al., "On Evaluating
Adversarial Robustness", 2019, sections 3 and 5):

- gradient      APGD-CE and targeted APGD-DLR on the file, by the gradients of its twin
- scaled        APGD-CE on the file's logits, scaled so that the loss does not saturate (the targeted loss is the same
                at any scale)
- disagreement  PGD on P(network is right) - P(file is right), for images on which the two differ (Hao et al., DIVA,
                MLSys 2022)
- transfer      AutoAttack's examples of the network
- square        Square asked of the file, without gradients

The network answers to all of these examples too, and to all of AutoAttack's: both are compared under the same attacks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pipeline.deployment.attacked_file import AttackedFile, ScaledLogits, scaled
from pipeline.deployment.formats import AttackStrength
from pipeline.evaluation.measures.autoattack import ITERATIONS, QUERIES, TARGETS, Ensemble, EnsembleName
from pipeline.evaluation.measures.base import hits, ranked
from pipeline.recipe.threat_model import ThreatModel
from pipeline.robustness.attacks import ball_of, pgd
from pipeline.robustness.noise import device_keys

GRADIENT = ("gradient", "scaled", "disagreement")
BLACK_BOX = ("transfer", "square")
"""Attacks that follow no gradient of the file."""
STEP_SHARE = 4
"""PGD's steps are eps / STEP_SHARE."""


@dataclass(frozen=True)
class Budget:
    network: EnsembleName
    """Attacks on the network whose examples the file is shown."""
    iterations: int
    targets: int
    queries: int


BUDGETS: dict[AttackStrength, Budget] = {
    "standard": Budget("autoattack", ITERATIONS, TARGETS, QUERIES),
    "reduced": Budget("apgd", 20, 3, 200),
}
Examples = Callable[[Tensor, Tensor, NDArray[np.int64]], Tensor]
"""Images, classes, ids of some images -> adversarial images."""


@dataclass(frozen=True)
class FileAttack:
    """The measure of an exported file; the network that it was made from is the one that is evaluated."""

    file: AttackedFile
    file_sha256: str
    strength: AttackStrength
    threat_model: ThreatModel
    classes: int
    seed: int

    @property
    def name(self) -> str:
        return "file"

    @property
    def settings(self) -> dict[str, Any]:
        budget = self._budget
        return {
            "norm": self.threat_model.norm,
            "eps": str(self.threat_model.eps),
            "strength": self.strength,
            "network_attacks": self._ensemble(budget.network).settings["attacks"],
            "iterations": budget.iterations,
            "targets": self._ensemble("apgd").targets,
            "queries": budget.queries,
            "file_sha256": self.file_sha256,
        }

    @property
    def title(self) -> str:
        settings = self.settings
        return (
            "worst case over attacks on the file (APGD-CE, targeted APGD, APGD-CE on scaled logits, disagreement, "
            f"Square) and {', '.join(settings['network_attacks'])} on the network; {settings['iterations']} iterations,"
            f" {settings['targets']} targets, {settings['queries']} queries; {self.threat_model.norm} eps "
            f"{self.threat_model.eps}"
        )

    @property
    def _budget(self) -> Budget:
        return BUDGETS[self.strength]

    def _ensemble(self, name: EnsembleName) -> Ensemble:
        budget = self._budget
        return Ensemble(
            name, self.threat_model, self.classes, self.seed, budget.iterations, budget.queries, budget.targets
        )

    def verdicts(self, network: nn.Module, x: Tensor, y: Tensor, ids: NDArray[np.int64]) -> dict[str, Tensor]:
        """clean_correct and robust_correct are the file's; network_* are the network's, twin_gap is the largest
        difference between twin and file on the image and its examples of the network."""
        file = self.file.to(x.device)
        with torch.no_grad():
            clean, network_clean = ranked(file(x)), ranked(network(x))
        left, network_left = hits(clean, y)[0], hits(network_clean, y)[0]
        columns = {"clean_prediction": clean[:, 0], "clean_correct": left.clone()}
        columns["network_clean_correct"] = network_left.clone()
        transferred = self._ensemble(self._budget.network).examples(network, x, y, ids)
        attacks: dict[str, Examples] = {
            "gradient": lambda *part: self._ensemble("apgd").examples(file, *part),
            "scaled": lambda *part: self._ensemble("apgd-ce").examples(ScaledLogits(file), *part),
            "disagreement": lambda *part: self._disagreement(network, *part),
            "transfer": lambda *part: transferred[left],
            "square": lambda *part: self._ensemble("square").examples(file, *part),
        }
        for name, examples in attacks.items():
            broken = torch.zeros_like(left)
            if left.any():
                attacked = x.clone()
                attacked[left] = examples(x[left], y[left], ids[left.cpu().numpy()])
                broken = left & ~_is_right(file, attacked, y)
                network_left &= _is_right(network, attacked, y)
            columns[f"broken_{name}"] = broken
            left &= ~broken
        network_left &= _is_right(network, transferred, y)
        gap = torch.maximum(file.twin_gap(x), file.twin_gap(transferred))
        return {
            **columns,
            "robust_correct": left,
            "network_robust_correct": network_left,
            "transfer_correct": columns["clean_correct"] & _is_right(file, transferred, y),
            "twin_gap": gap,
        }

    def _disagreement(self, network: nn.Module, x: Tensor, y: Tensor, ids: NDArray[np.int64]) -> Tensor:
        ball, keys = ball_of(self.threat_model), device_keys(ids, x.device, self.seed, "disagreement", 0)

        def both(images: Tensor) -> Tensor:
            return torch.stack([network(images), self.file(images)], dim=1)

        def loss(logits: Tensor) -> Tensor:
            right = scaled(logits).softmax(dim=-1).gather(2, y[:, None, None].expand(-1, 2, 1)).squeeze(2)
            return right[:, 0] - right[:, 1]

        return pgd(
            both,
            x,
            loss,
            ball=ball,
            steps=self._budget.iterations,
            step_size=ball.eps / STEP_SHARE,
            start=ball.random_start(x, keys),
        )


def _is_right(network: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Bool [n]."""
    with torch.no_grad():
        return hits(ranked(network(x)), y)[0]
