"""Robust training objectives: functions of a micro-batch that return its loss and counts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial, singledispatch

from pipeline.recipe import schema
from pipeline.recipe.objective import (
    Clean,
    CrownIbp,
    Fgsm,
    FgsmPgi,
    Free,
    Ibp,
    MixTrain,
    Nfgsm,
    Noise,
    Pgd,
    SmoothAdv,
    Stability,
    Trades,
)
from pipeline.recipe.schedules import strength_at
from pipeline.recipe.technique import Attacking, CrossEntropy, Technique
from pipeline.recipe.threat_model import ThreatModel
from pipeline.robustness.attacks import Ball, L2Ball, LinfBall, ball_of
from pipeline.robustness.objectives.adversarial import (
    adversarial_training,
    clean_training,
    fgsm_pgi_training,
    nfgsm_training,
)
from pipeline.robustness.objectives.base import Autocast, Forward, Objective, ObjectiveInput, ObjectiveOutput
from pipeline.robustness.objectives.crown_ibp import certified_training
from pipeline.robustness.objectives.free import free_training
from pipeline.robustness.objectives.mixtrain import mixtrain_training
from pipeline.robustness.objectives.smoothing import noise_training, smoothadv_training, stability_training
from pipeline.robustness.objectives.trades import trades_training
from pipeline.robustness.overfitting import stronger

__all__ = [
    "Autocast",
    "Forward",
    "Objective",
    "ObjectiveInput",
    "ObjectiveOutput",
    "attack_strength",
    "build_objective",
]


def attack_strength(objective: schema.Objective, phase: str, elapsed: float) -> float:
    """Fraction of eps and step_size, in [0, 1], that an attack uses after the fraction `elapsed` of a phase."""
    if phase != "pretrain" or not isinstance(objective, Attacking):
        return 1.0
    return strength_at(elapsed, objective.eps_warmup)


@singledispatch
def build_objective(objective: Technique, threat_model: ThreatModel | None, phase: str, level: int = 0) -> Objective:
    """The recipe's objective for a phase; eps, step_size and sigma are in pixel units.

    From `level` 1 on, a one-step objective becomes PGD adversarial training (see `pipeline.robustness.overfitting`).

    Schedules of eps and of loss weights run in pretrain only: the other phases start from a network trained at full
    eps. Objectives that need a threat model require it in their signature; the recipe's validation ensures it is set.
    """
    raise NotImplementedError(f"{type(objective).__name__} has no training")


@build_objective.register
def _(objective: Clean, *_: object) -> Objective:
    return partial(clean_training, label_smoothing=objective.label_smoothing)


@build_objective.register
def _(objective: Pgd | Fgsm, threat_model: ThreatModel, phase: str, level: int = 0) -> Objective:
    def train(ball: Ball, step_size: float) -> Objective:
        return adversarial_training(ball, objective.steps, step_size, objective.label_smoothing)

    return _with_attack(objective, threat_model, phase, level, train)


@build_objective.register
def _(objective: Nfgsm, threat_model: ThreatModel, phase: str, level: int = 0) -> Objective:
    def train(ball: Ball, step_size: float) -> Objective:
        return nfgsm_training(LinfBall(ball.eps), step_size, objective.noise_magnitude, objective.label_smoothing)

    return _with_attack(objective, threat_model, phase, level, train)


@build_objective.register
def _(objective: FgsmPgi, threat_model: ThreatModel, phase: str, level: int = 0) -> Objective:
    def train(ball: Ball, step_size: float) -> Objective:
        return fgsm_pgi_training(LinfBall(ball.eps), step_size, objective.prior_weight, objective.label_smoothing)

    return _with_attack(objective, threat_model, phase, level, train)


@build_objective.register
def _(objective: Free, threat_model: ThreatModel, phase: str, level: int = 0) -> Objective:
    def train(ball: Ball, step_size: float) -> Objective:
        return free_training(ball, step_size, objective.label_smoothing)

    return _with_attack(objective, threat_model, phase, level, train)


@build_objective.register
def _(objective: Trades, threat_model: ThreatModel, phase: str, level: int = 0) -> Objective:
    def train(ball: Ball, step_size: float) -> Objective:
        return trades_training(ball, objective.steps, step_size, objective.beta)

    return _with_attack(objective, threat_model, phase, level, train)


@build_objective.register
def _(objective: Noise, *_: object) -> Objective:
    return noise_training(float(objective.sigma), objective.label_smoothing)


@build_objective.register
def _(objective: Stability, *_: object) -> Objective:
    return stability_training(float(objective.sigma), objective.beta)


@build_objective.register
def _(objective: SmoothAdv, threat_model: ThreatModel, phase: str, level: int = 0) -> Objective:
    def train(ball: Ball, step_size: float) -> Objective:
        smoothing = float(objective.sigma), objective.noise_samples, objective.label_smoothing
        return smoothadv_training(L2Ball(ball.eps), objective.steps, step_size, *smoothing)

    return _with_attack(objective, threat_model, phase, level, train)


@build_objective.register
def _(objective: Ibp | CrownIbp, threat_model: ThreatModel, phase: str, level: int = 0) -> Objective:
    kappa = (objective.kappa_start, objective.kappa_end)
    crown = (objective.crown_start, objective.crown_end) if isinstance(objective, CrownIbp) else (0.0, 0.0)
    return _with_schedules(certified_training(float(threat_model.eps), objective.eps_ramp, kappa, crown), phase)


@build_objective.register
def _(objective: MixTrain, threat_model: ThreatModel, phase: str, level: int = 0) -> Objective:
    robust = objective.robust_samples, objective.robust_probability
    weight = (objective.robust_weight_start, objective.robust_weight_end)
    return _with_schedules(mixtrain_training(float(threat_model.eps), objective.eps_ramp, *robust, weight), phase)


def _with_attack(
    objective: Attacking,
    threat_model: ThreatModel,
    phase: str,
    level: int,
    train: Callable[[Ball, float], Objective],
) -> Objective:
    """`train` with the ball and step size of the attack: warmed up in pretrain, at full strength in other phases.

    eps and step_size grow together, because N-FGSM's step is not projected onto the ball.
    """

    def at(strength: float) -> Objective:
        ball, step_size = ball_of(threat_model), strength * float(objective.step_size)
        ball = replace(ball, eps=strength * ball.eps)
        if level > 0:
            smoothing = objective.label_smoothing if isinstance(objective, CrossEntropy) else 0.0
            return adversarial_training(ball, *stronger(level, ball.eps, step_size), smoothing)
        return train(ball, step_size)

    if phase != "pretrain" or not objective.eps_warmup:
        return at(1.0)

    def with_warmup(batch: ObjectiveInput) -> ObjectiveOutput:
        return at(strength_at(batch.elapsed, objective.eps_warmup))(batch)

    return with_warmup


def _with_schedules(objective: Objective, phase: str) -> Objective:
    """The objective, with schedules running over pretrain and fixed at their end values in the other phases."""
    if phase == "pretrain":
        return objective

    def at_schedule_end(batch: ObjectiveInput) -> ObjectiveOutput:
        return objective(replace(batch, elapsed=1.0))

    return at_schedule_end
