"""Attacks on finished networks, beside the measure that their objective asks for. No torch here."""

from __future__ import annotations

from typing import Literal, get_args

from pydantic import Field, model_validator

from pipeline.recipe.fields import Pixels, Section
from pipeline.recipe.objective import Objective
from pipeline.recipe.technique import Smoothing
from pipeline.recipe.threat_model import ThreatModel

AttackName = Literal["pgd", "apgd", "autoattack", "square", "transfer", "corruptions"]
ATTACKS: tuple[AttackName, ...] = get_args(AttackName)
STEPPING = ("pgd", "transfer")
"""Attacks whose steps are chosen; AutoAttack's budgets are its authors'."""
FOLLOWING = ("pgd", "apgd", "autoattack")
"""Attacks that follow the network's own gradient, so that honesty checks tell whether they can be believed."""
TARGETED = ("apgd", "autoattack")
LEAST_CLASSES = 4
"""What the targeted loss needs: it looks at the four largest logits (Croce and Hein, ICML 2020, eq. 7)."""


class Attack(Section):
    """One further evaluation of each finished network on test images."""

    name: AttackName
    images: int | None = Field(default=None, ge=1)
    """How many test images, evenly spread over the file; null means all of them."""
    chunk: int | None = Field(default=None, ge=1)
    """Images in one call; null: evaluation.chunk. Part of the result: AutoAttack's random numbers are per call."""
    steps: int | None = Field(default=None, ge=1)
    """pgd, transfer; null: evaluation.steps."""
    restarts: int | None = Field(default=None, ge=1)
    """pgd, transfer; null: evaluation.restarts."""
    step_size: Pixels | None = None
    """pgd, transfer; null: evaluation.step_size."""

    @property
    def label(self) -> str:
        """What its files are called, unlike those of another attack of a recipe: autoattack, pgd-50x10."""
        steps, restarts = self.steps or "", f"x{self.restarts}" if self.restarts else ""
        return f"{self.name}-{steps}{restarts}" if steps or restarts else self.name

    @model_validator(mode="after")
    def _steps_are_pgds(self) -> Attack:
        given = {"steps": self.steps, "restarts": self.restarts, "step_size": self.step_size}
        odd = [key for key, value in given.items() if value is not None]
        if odd and self.name not in STEPPING:
            raise ValueError(
                f"{odd[0]} {given[odd[0]]}: {self.name} is run as its authors set it; remove this key, or use name: pgd"
            )
        if self.step_size is not None and self.step_size <= 0:
            raise ValueError(f"step_size {self.step_size} must be positive, for example 1/255")
        return self


def check_attack(
    attack: Attack, key: str, objective: Objective, threat_model: ThreatModel | None, classes: int, step: Pixels | None
) -> None:
    """Raise ValueError, naming `key`, unless such networks can be attacked so. `step`: PGD's step size elsewhere."""
    if threat_model is None and attack.name != "corruptions":
        raise ValueError(
            f"{key} {attack.name} needs a threat_model, the ball that images may be moved in; add one, or leave it out"
        )
    if isinstance(objective, Smoothing):
        raise ValueError(
            f"{key} {attack.name} would judge the network without its noise, which is not what {objective.name} "
            "trains; leave it out: certificates bound every attack"
        )
    if attack.name in TARGETED and classes < LEAST_CLASSES:
        raise ValueError(
            f"{key} {attack.name} needs {LEAST_CLASSES} classes for its targeted loss, and there are {classes}; "
            "use square, or pgd with many steps"
        )
    if attack.name in STEPPING and attack.step_size is None and step is None:
        raise ValueError(f"{key} {attack.name} has no step size; give it one, for example step_size: 1/255")
