"""Robust training techniques: functions that are handed the attack and return a loss."""

from __future__ import annotations

from dataclasses import replace

from pipeline import recipe
from pipeline.attacks import ball_of
from pipeline.objectives.adversarial import adversarial_training, clean_training
from pipeline.objectives.certified import certified_training
from pipeline.objectives.mixtrain import mixtrain_training
from pipeline.objectives.outcome import Autocast, Forward, Given, Objective, Outcome
from pipeline.objectives.trades import trades_training

__all__ = ["COUNTS", "Autocast", "Forward", "Given", "Objective", "Outcome", "build_objective"]

COUNTS = {
    "clean": (True, False),
    "pgd": (False, True),
    "fgsm": (False, True),
    "trades": (True, True),
    "ibp": (True, True),
    "crown_ibp": (True, True),
    "mixtrain": (True, False),
}
"""objective.name -> whether its outcomes count (clean, robust) correct predictions.

Robust are adversarial examples that are classified right; for ibp and crown_ibp, images that are proved robust.
"""


def build_objective(objective: recipe.Objective, threat_model: recipe.ThreatModel | None, phase: str) -> Objective:
    """The objective that a recipe names; eps and step_size are in pixels.

    Schedules of eps and of mixing run in pretrain; in every other `phase` they have reached their end.

    A recipe without threat_model or step_size for an objective that needs them is refused when it is read.
    """
    if objective.name == "clean":
        return clean_training
    assert threat_model is not None, objective.name
    if objective.name in ("ibp", "crown_ibp", "mixtrain"):
        certified = _certified(objective, float(threat_model.eps))
        return certified if phase == "pretrain" else _settled(certified)
    assert objective.step_size is not None, objective.name
    ball, step_size = ball_of(threat_model), float(objective.step_size)
    if objective.name == "trades":
        return trades_training(ball, objective.steps, step_size, objective.beta)
    return adversarial_training(ball, objective.steps, step_size)


def _certified(objective: recipe.Objective, eps: float) -> Objective:
    if objective.name == "mixtrain":
        weight = (objective.robust_weight_start, objective.robust_weight_end)
        return mixtrain_training(
            eps, objective.eps_ramp, objective.robust_samples, objective.robust_probability, weight
        )
    kappa = (objective.kappa_start, objective.kappa_end)
    crown = (objective.crown_start, objective.crown_end) if objective.name == "crown_ibp" else (0.0, 0.0)
    return certified_training(eps, objective.eps_ramp, kappa, crown)


def _settled(objective: Objective) -> Objective:
    def settled(given: Given) -> Outcome:
        return objective(replace(given, elapsed=1.0))

    return settled
