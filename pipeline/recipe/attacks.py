"""Attacks on finished networks, in addition to the measure that their objective implies. Imports no torch."""

from __future__ import annotations

from typing import Literal, get_args

from pydantic import Field, model_validator

from pipeline.recipe.fields import Count, Pixels, Section
from pipeline.recipe.objective import Objective
from pipeline.recipe.technique import Smoothing
from pipeline.recipe.threat_model import ThreatModel

AttackName = Literal["pgd", "apgd", "autoattack", "square", "transfer", "corruptions"]
ATTACKS: tuple[AttackName, ...] = get_args(AttackName)
STEPPING = ("pgd", "transfer")
"""Attacks whose number of steps is configurable; AutoAttack runs with its authors' budgets."""
FOLLOWING = ("pgd", "apgd", "autoattack")
"""Attacks that follow the network's own gradient, so that the honesty checks apply to them."""
TARGETED = ("apgd", "autoattack")
MIN_CLASSES = 4
"""The targeted loss compares the four largest logits (Croce and Hein, ICML 2020, eq. 7)."""


class Attack(Section):
    """One additional evaluation of each finished network on test images."""

    name: AttackName
    images: Count | None = Field(default=None, ge=1)
    """Number of test images, evenly spaced over the file; null means all of them."""
    chunk: Count | None = Field(default=None, ge=1)
    """Images per call; null: evaluation.chunk. It affects the result: AutoAttack draws its random numbers per call."""
    steps: Count | None = Field(default=None, ge=1)
    """pgd, transfer; null: evaluation.steps."""
    restarts: Count | None = Field(default=None, ge=1)
    """pgd, transfer; null: evaluation.restarts."""
    step_size: Pixels | None = None
    """pgd, transfer; null: evaluation.step_size."""

    @property
    def label(self) -> str:
        """Stem of its files' names, unique within a recipe: autoattack, pgd-50x10."""
        steps, restarts = self.steps or "", f"x{self.restarts}" if self.restarts else ""
        return f"{self.name}-{steps}{restarts}" if steps or restarts else self.name

    @model_validator(mode="after")
    def _only_pgd_has_steps(self) -> Attack:
        values = {"steps": self.steps, "restarts": self.restarts, "step_size": self.step_size}
        keys = [key for key, value in values.items() if value is not None]
        if keys and self.name not in STEPPING:
            raise ValueError(
                f"{keys[0]} {values[keys[0]]}: {self.name} is run as its authors set it; remove this key, or "
                "use name: pgd"
            )
        if self.step_size is not None and self.step_size <= 0:
            raise ValueError(f"step_size {self.step_size} must be positive, for example 1/255")
        return self


def check_attack(
    attack: Attack, key: str, objective: Objective, threat_model: ThreatModel | None, classes: int, step: Pixels | None
) -> None:
    """Raise ValueError, naming `key`, if the attack does not fit the objective. `step`: evaluation.step_size."""
    if threat_model is None and attack.name != "corruptions":
        raise ValueError(
            f"{key} {attack.name} needs a threat_model, the ball to search around each image; add one or remove it"
        )
    if isinstance(objective, Smoothing):
        raise ValueError(
            f"{key} {attack.name} would evaluate the network without its noise, which is not what {objective.name} "
            "trains; leave it out: certificates bound every attack"
        )
    if attack.name in TARGETED and classes < MIN_CLASSES:
        raise ValueError(
            f"{key} {attack.name} needs {MIN_CLASSES} classes for its targeted loss, and there are {classes}; "
            "use square, or pgd with many steps"
        )
    if attack.name in STEPPING and attack.step_size is None and step is None:
        raise ValueError(f"{key} {attack.name} has no step size; give it one, for example step_size: 1/255")
