"""Robust training techniques: functions that are handed the attack and return a loss."""

from __future__ import annotations

from dataclasses import replace

from pipeline.recipe import schema
from pipeline.recipe.objective import PROVING
from pipeline.recipe.schedules import strength_at
from pipeline.robustness.attacks import L2Ball, LinfBall, ball_of
from pipeline.robustness.objectives.adversarial import adversarial_training, clean_training, nfgsm_training
from pipeline.robustness.objectives.base import Autocast, Forward, Objective, ObjectiveInput, ObjectiveOutput
from pipeline.robustness.objectives.crown_ibp import certified_training
from pipeline.robustness.objectives.free import free_training
from pipeline.robustness.objectives.mixtrain import mixtrain_training
from pipeline.robustness.objectives.smoothing import noise_training, smoothadv_training, stability_training
from pipeline.robustness.objectives.trades import trades_training
from pipeline.robustness.overfitting import stronger

__all__ = [
    "COUNTS",
    "Autocast",
    "Forward",
    "Objective",
    "ObjectiveInput",
    "ObjectiveOutput",
    "attack_strength",
    "build_objective",
]

COUNTS = {
    "clean": (True, False),
    "pgd": (False, True),
    "fgsm": (False, True),
    "nfgsm": (False, True),
    "free": (False, True),
    "trades": (True, True),
    "noise": (False, True),
    "stability": (True, True),
    "smoothadv": (False, True),
    "ibp": (True, True),
    "crown_ibp": (True, True),
    "mixtrain": (True, False),
}
"""objective.name -> whether its outcomes count (clean, robust) correct predictions.

Robust is correct on attacked images, on noisy ones for noise and stability, and proved robust for ibp and crown_ibp.
"""


def attack_strength(objective: schema.Objective, phase: str, elapsed: float) -> float:
    """Share of its eps and step_size that an attack has, in [0, 1], when `elapsed` of a phase is done."""
    return strength_at(elapsed, objective.eps_warmup) if phase == "pretrain" else 1.0


def build_objective(
    objective: schema.Objective, threat_model: schema.ThreatModel | None, phase: str, level: int = 0
) -> Objective:
    """The objective that a recipe names, for a phase; eps, step_size and sigma are in pixels.

    From `level` 1 on, a one-step objective is adversarial training by PGD (see `pipeline.robustness.overfitting`).

    Schedules of eps and of mixing run in pretrain only: the other phases begin with a network that withstands the whole
    of it. A recipe without what its objective needs is refused when it is read.
    """
    if objective.name == "clean":
        return clean_training
    if objective.name == "noise":
        return noise_training(_sigma(objective))
    if objective.name == "stability":
        return stability_training(_sigma(objective), objective.beta)
    assert threat_model is not None, objective.name
    if objective.name in PROVING:
        proving = _proving(objective, float(threat_model.eps))
        return proving if phase == "pretrain" else _settled(proving)
    if phase != "pretrain" or not objective.eps_warmup:
        return _with_attack(objective, threat_model, 1.0, level)

    def warming_up(given: ObjectiveInput) -> ObjectiveOutput:
        strength = attack_strength(objective, phase, given.elapsed)
        return _with_attack(objective, threat_model, strength, level)(given)

    return warming_up


def _sigma(objective: schema.Objective) -> float:
    assert objective.sigma is not None, objective.name
    return float(objective.sigma)


def _with_attack(
    objective: schema.Objective, threat_model: schema.ThreatModel, strength: float, level: int
) -> Objective:
    """eps and step_size times `strength`: in proportion, as N-FGSM's step is not held back by any ball."""
    assert objective.step_size is not None, objective.name
    ball, step_size = ball_of(threat_model), strength * float(objective.step_size)
    ball = replace(ball, eps=strength * ball.eps)
    if level > 0:
        return adversarial_training(ball, *stronger(level, ball.eps, step_size))
    if objective.name == "trades":
        return trades_training(ball, objective.steps, step_size, objective.beta)
    if objective.name == "nfgsm":
        assert isinstance(ball, LinfBall), threat_model.norm
        return nfgsm_training(ball, step_size, objective.noise_magnitude)
    if objective.name == "free":
        return free_training(ball, step_size)
    if objective.name == "smoothadv":
        assert isinstance(ball, L2Ball), threat_model.norm
        return smoothadv_training(ball, objective.steps, step_size, _sigma(objective), objective.noise_samples)
    return adversarial_training(ball, objective.steps, step_size)


def _proving(objective: schema.Objective, eps: float) -> Objective:
    if objective.name == "mixtrain":
        weight = (objective.robust_weight_start, objective.robust_weight_end)
        return mixtrain_training(
            eps, objective.eps_ramp, objective.robust_samples, objective.robust_probability, weight
        )
    kappa = (objective.kappa_start, objective.kappa_end)
    crown = (objective.crown_start, objective.crown_end) if objective.name == "crown_ibp" else (0.0, 0.0)
    return certified_training(eps, objective.eps_ramp, kappa, crown)


def _settled(objective: Objective) -> Objective:
    def settled(given: ObjectiveInput) -> ObjectiveOutput:
        return objective(replace(given, elapsed=1.0))

    return settled
