"""What all training techniques have, and the mixins that hold what several of them share. No torch here."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field

from pipeline.recipe.fields import Pixels, Section
from pipeline.recipe.threat_model import ThreatModel

MeasureName = Literal["pgd", "certified", "verified"]
"""The evaluation that every finished network of a recipe gets."""


class Technique(Section):
    """A robust training technique."""

    name: Any
    """A Literal in each technique, which tells the classes apart."""
    measure: ClassVar[MeasureName] = "pgd"
    """How networks that are trained so are evaluated: the name of the evaluation's files."""
    counts_clean: ClassVar[bool] = False
    """Whether its outcomes count correct predictions on clean images."""
    counts_robust: ClassVar[bool] = True
    """Whether its outcomes count correct predictions on attacked images: on noisy ones for noise and stability, and
    proved robust for ibp and crown_ibp."""
    carries_noise: ClassVar[bool] = False
    """Whether a perturbation of the images is state that one step leaves to the next."""

    @property
    def passes_per_step(self) -> int | None:
        """Forward and backward passes that an image of one optimizer step goes through; a forward alone is not counted.

        None where bounds are propagated, which is no pass of the network.
        """
        return 1

    @property
    def steps_per_batch(self) -> int:
        """Optimizer steps in a row that are taken on the same images."""
        return 1

    @property
    def smallest_ratio(self) -> float | None:
        """Smallest allowed ratio of accuracy under PGD to that under one step; None: training is not guarded."""
        return None

    @property
    def guarded(self) -> bool:
        """Whether training is watched for catastrophic overfitting."""
        return self.smallest_ratio is not None

    def check_threat_model(self, key: str, threat_model: ThreatModel | None) -> None:
        """Refuse a threat model that the technique cannot train for. Errors: ValueError, for the objective at `key`."""
        if threat_model is None:
            raise ValueError(
                f"{key}.name {self.name} needs a threat_model; "
                f"add threat_model: {{norm: linf, eps: 4/255}} or use {key}={{name: clean}}"
            )


class Attacking(Technique):
    """Trains on attacked images."""

    step_size: Pixels = Field(gt=0, examples=["1/255"])
    """Length of one attack step."""
    eps_warmup: float = Field(default=0.0, ge=0, lt=1)
    """Share of the pretrain phase over which eps and step_size grow from zero, linearly; 0 is the whole eps at once."""


class MultiStep(Technique):
    """Its attack has a number of steps that the recipe chooses."""

    steps: int = Field(default=1, ge=1)

    @property
    def passes_per_step(self) -> int:
        return self.steps + 1


class OneStep(Attacking):
    """Its attack has one step, to which training may overfit."""

    steps: ClassVar[int] = 1
    overfitting_guard: float | None = Field(default=0.5, gt=0, le=1)
    """Smallest allowed ratio of accuracy under PGD to that under one step; null: no guard."""

    @property
    def passes_per_step(self) -> int:
        return 2

    @property
    def smallest_ratio(self) -> float | None:
        return self.overfitting_guard


class Smoothing(Technique):
    """Trains a network that is smoothed with Gaussian noise, and certified so."""

    measure: ClassVar[MeasureName] = "certified"
    sigma: Pixels = Field(gt=0, examples=["1/4"])
    """Standard deviation of the Gaussian noise that the network is smoothed with."""

    def check_threat_model(self, key: str, threat_model: ThreatModel | None) -> None:
        norm = threat_model.norm if threat_model is not None else None
        if norm != "l2":
            raise ValueError(
                f"{key}.name {self.name} is for randomized smoothing, which certifies l2 radii, and "
                f"threat_model.norm is {norm}; set threat_model={{norm: l2, eps: 1/4}} with the radius that counts "
                "as robust"
            )


class Bounding(Technique):
    """Trains by sound bounds, and is evaluated by them."""

    measure: ClassVar[MeasureName] = "verified"
    counts_clean: ClassVar[bool] = True
    eps_ramp: float = Field(default=0.6, ge=0, le=1)
    """Share of pretrain over which eps rises from 0; it is whole in the other phases."""

    @property
    def passes_per_step(self) -> None:
        return None

    def check_threat_model(self, key: str, threat_model: ThreatModel | None) -> None:
        super().check_threat_model(key, threat_model)
        if threat_model is not None and threat_model.norm != "linf":
            raise ValueError(
                f"{key}.name {self.name} bounds networks over linf balls, and threat_model.norm is "
                f"{threat_model.norm}; use threat_model.norm=linf"
            )
