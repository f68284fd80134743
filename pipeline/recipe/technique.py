"""The base class of training techniques, and mixins with the keys that several share. Imports no torch."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field

from pipeline.recipe.fields import Count, Pixels, Real, Section
from pipeline.recipe.threat_model import ThreatModel

MeasureName = Literal["pgd", "certified", "verified"]
"""The main evaluation of every finished network of a recipe."""


class Technique(Section):
    """A robust training technique."""

    name: Any
    """A Literal in each technique: the tag of the union."""
    measure: ClassVar[MeasureName] = "pgd"
    """The evaluation of networks trained with it, and the stem of its files."""
    counts_clean: ClassVar[bool] = False
    """Whether its training metrics include accuracy on clean images."""
    counts_robust: ClassVar[bool] = True
    """Whether its training metrics include accuracy on attacked images; on noisy images for noise and stability, and
    verified accuracy for ibp and crown_ibp."""
    carries_noise: ClassVar[bool] = False
    """Whether the perturbation of the images is state carried from one step to the next."""

    @property
    def passes_per_step(self) -> int | None:
        """Forward-backward passes per image and optimizer step; a forward pass alone does not count.

        None where bounds are propagated instead.
        """
        return 1

    @property
    def update_passes(self) -> int:
        """Those of the update alone, without the attack's."""
        return 1

    @property
    def steps_per_batch(self) -> int:
        """Consecutive optimizer steps on the same images."""
        return 1

    @property
    def smallest_ratio(self) -> float | None:
        """Minimum ratio of accuracy under PGD to accuracy under one step; None: no overfitting guard."""
        return None

    @property
    def guarded(self) -> bool:
        """Whether training is monitored for catastrophic overfitting."""
        return self.smallest_ratio is not None

    def remembered_bytes(self, image_size: int) -> int:
        """Bytes per training image that each worker and each checkpoint hold from one epoch to the next."""
        return 0

    def check_threat_model(self, key: str, threat_model: ThreatModel | None) -> None:
        """Refuse a threat model that the technique does not support. Errors: ValueError, naming `key`."""
        if threat_model is None:
            raise ValueError(
                f"{key}.name {self.name} needs a threat_model; "
                f"add threat_model: {{norm: linf, eps: 4/255}} or use {key}={{name: clean}}"
            )


class CrossEntropy(Technique):
    """Trains with cross-entropy alone. Label smoothing has no counterpart in bounds of margins, and in TRADES and
    stability training the divergence already keeps predictions soft."""

    label_smoothing: Real = Field(default=0.0, ge=0, lt=1)
    """Share of the label that is spread evenly over all classes, in the loss of the update; the attack of `free`, which
    uses the same gradient, follows it too, and other attacks do not."""


class Attacking(Technique):
    """Trains on attacked images."""

    step_size: Pixels = Field(gt=0, examples=["1/255"])
    """Length of one attack step."""
    eps_warmup: Real = Field(default=0.0, ge=0, lt=1)
    """Fraction of the pretrain phase over which eps and step_size grow linearly from zero; 0: full eps at once."""


class MultiStep(Technique):
    """Trains with an attack whose number of steps the recipe sets."""

    steps: Count = Field(default=1, ge=1)

    @property
    def passes_per_step(self) -> int:
        return self.steps + 1


class OneStep(CrossEntropy, Attacking):
    """Trains with a one-step attack, which is prone to catastrophic overfitting."""

    steps: ClassVar[int] = 1
    overfitting_guard: Real | None = Field(default=0.5, gt=0, le=1)
    """Minimum ratio of accuracy under PGD to accuracy under one step; null: no guard."""

    @property
    def passes_per_step(self) -> int:
        return 2

    @property
    def smallest_ratio(self) -> float | None:
        return self.overfitting_guard


class Smoothing(Technique):
    """Trains for randomized smoothing with Gaussian noise, and is certified by it."""

    measure: ClassVar[MeasureName] = "certified"
    sigma: Pixels = Field(gt=0, examples=["1/4"])
    """Standard deviation of the smoothing noise, in [0, 1] pixel units."""

    def check_threat_model(self, key: str, threat_model: ThreatModel | None) -> None:
        norm = threat_model.norm if threat_model is not None else None
        if norm != "l2":
            raise ValueError(
                f"{key}.name {self.name} is for randomized smoothing, which certifies l2 radii, and "
                f"threat_model.norm is {norm}; set threat_model={{norm: l2, eps: 1/4}} with the radius to "
                "certify"
            )


class Bounding(Technique):
    """Trains on sound bounds of the logits, and is verified with them."""

    measure: ClassVar[MeasureName] = "verified"
    counts_clean: ClassVar[bool] = True
    eps_ramp: Real = Field(default=0.6, ge=0, le=1)
    """Fraction of the pretrain phase over which eps grows from 0; the other phases use the full eps."""

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
