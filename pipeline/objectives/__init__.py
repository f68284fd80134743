"""Robust training techniques: functions that are handed the attack and return a loss."""

from __future__ import annotations

from pipeline import recipe
from pipeline.attacks import ball_of
from pipeline.objectives.adversarial import adversarial_training, clean_training
from pipeline.objectives.outcome import Autocast, Forward, Given, Objective, Outcome
from pipeline.objectives.trades import trades_training

__all__ = ["COUNTS", "Autocast", "Forward", "Given", "Objective", "Outcome", "build_objective"]

COUNTS = {
    "clean": (True, False),
    "pgd": (False, True),
    "fgsm": (False, True),
    "trades": (True, True),
}
"""objective.name -> whether its outcomes count (clean, robust) correct predictions."""


def build_objective(objective: recipe.Objective, threat_model: recipe.ThreatModel | None) -> Objective:
    """The objective that a recipe names; eps and step_size are in pixels.

    A recipe without threat_model or step_size for an objective that needs them is refused when it is read.
    """
    if objective.name == "clean":
        return clean_training
    assert threat_model is not None, objective.name
    assert objective.step_size is not None, objective.name
    ball, step_size = ball_of(threat_model), float(objective.step_size)
    if objective.name == "trades":
        return trades_training(ball, objective.steps, step_size, objective.beta)
    return adversarial_training(ball, objective.steps, step_size)
