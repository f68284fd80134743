"""The training objective of a recipe: one class per technique, selected by `name`. Imports no torch.

Each class has the keys of its technique alone, so that any other key is an error. What the rest of the pipeline needs
to know about a technique is in class attributes and properties.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import Discriminator, Field, Tag

from pipeline.recipe.fields import Count, Real
from pipeline.recipe.technique import Attacking, Bounding, CrossEntropy, MultiStep, OneStep, Smoothing, Technique
from pipeline.recipe.threat_model import ThreatModel


class Clean(CrossEntropy):
    """Empirical risk minimisation."""

    name: Literal["clean"] = "clean"
    counts_clean: ClassVar[bool] = True
    counts_robust: ClassVar[bool] = False

    def check_threat_model(self, key: str, threat_model: ThreatModel | None) -> None:
        """Accepts any threat model, and none."""


class Pgd(CrossEntropy, Attacking, MultiStep):
    """Adversarial training by PGD (Madry et al. 2018)."""

    name: Literal["pgd"] = "pgd"


class Fgsm(OneStep):
    """Fast adversarial training: one step from a random start (Wong et al. 2020)."""

    name: Literal["fgsm"] = "fgsm"


class _SignedStep(OneStep):
    """Takes a signed step, which is the steepest one for linf only."""

    def check_threat_model(self, key: str, threat_model: ThreatModel | None) -> None:
        super().check_threat_model(key, threat_model)
        if threat_model is not None and threat_model.norm != "linf":
            raise ValueError(
                f"{key}.name {self.name} is defined for linf, and threat_model.norm is {threat_model.norm}; "
                f"use {key}.name=fgsm"
            )


class Nfgsm(_SignedStep):
    """One step from larger noise, without projection (de Jorge et al. 2022)."""

    name: Literal["nfgsm"] = "nfgsm"
    noise_magnitude: Real = Field(default=2.0, gt=0)
    """Largest noise per pixel, in multiples of eps (k in the paper)."""


class FgsmPgi(_SignedStep):
    """One step from the perturbation that the image had in its last epoch (Jia et al. 2022)."""

    name: Literal["fgsm_pgi"] = "fgsm_pgi"
    prior_weight: Real = Field(default=10.0, ge=0)
    """Weight of the squared difference between the logits at the start and at the example, averaged over images and
    classes (lambda in the paper; averaged over classes as in the authors' code)."""
    reset_epochs: Count = Field(default=40, ge=1)
    """Epochs after which all images start from random perturbations again."""

    @property
    def passes_per_step(self) -> int:
        return 1 + self.update_passes

    @property
    def update_passes(self) -> int:
        """At the start and at the example."""
        return 2

    def remembered_bytes(self, image_size: int) -> int:
        """A byte per value of three channels, and the epoch as an int32."""
        return 3 * image_size**2 + 4


class Free(OneStep):
    """Free adversarial training: each batch is replayed several times in a row (Shafahi et al. 2019)."""

    name: Literal["free"] = "free"
    carries_noise: ClassVar[bool] = True
    replays: Count = Field(default=4, ge=1)
    """Consecutive steps on each batch (m in the paper); an epoch has m times as many steps."""

    @property
    def passes_per_step(self) -> int:
        """One: the backward pass that updates the weights updates the perturbation too."""
        return 1

    @property
    def steps_per_batch(self) -> int:
        return self.replays


class Trades(Attacking, MultiStep):
    """TRADES (Zhang et al. 2019)."""

    name: Literal["trades"] = "trades"
    counts_clean: ClassVar[bool] = True
    beta: Real = Field(default=6.0, gt=0)
    """Weight of the KL term (equation 5: beta is their 1/lambda)."""

    @property
    def passes_per_step(self) -> int:
        return self.steps + 2

    @property
    def update_passes(self) -> int:
        return 2


class Noise(CrossEntropy, Smoothing):
    """Gaussian noise augmentation (Cohen et al. 2019)."""

    name: Literal["noise"] = "noise"


class Stability(Smoothing):
    """Stability training under Gaussian noise (Li et al. 2019)."""

    name: Literal["stability"] = "stability"
    counts_clean: ClassVar[bool] = True
    beta: Real = Field(default=6.0, gt=0)
    """Weight of the KL term."""

    @property
    def passes_per_step(self) -> int:
        return self.update_passes

    @property
    def update_passes(self) -> int:
        return 2


class SmoothAdv(CrossEntropy, Smoothing, Attacking, MultiStep):
    """Adversarial training of the smoothed network (Salman et al. 2019)."""

    name: Literal["smoothadv"] = "smoothadv"
    noise_samples: Count = Field(default=1, ge=1)
    """Noise draws per image (m in the paper), which multiply the images of a forward pass."""

    @property
    def passes_per_step(self) -> int:
        return (self.steps + 1) * self.noise_samples

    @property
    def update_passes(self) -> int:
        return self.noise_samples


class _Mixed(Bounding):
    """Mixes clean and worst-case cross-entropy, with weights that change over the ramp."""

    kappa_start: Real = Field(default=1.0, ge=0, le=1)
    """Weight of clean cross-entropy at the start of the ramp; the worst case has the rest."""
    kappa_end: Real = Field(default=0.5, ge=0, le=1)
    """The same from the end of the ramp on (Gowal et al. 2018, section 4)."""


class Ibp(_Mixed):
    """Interval bound propagation (Gowal et al. 2018)."""

    name: Literal["ibp"] = "ibp"


class CrownIbp(_Mixed):
    """CROWN-IBP (Zhang et al. 2020)."""

    name: Literal["crown_ibp"] = "crown_ibp"
    crown_start: Real = Field(default=1.0, ge=0, le=1)
    """Weight of the CROWN bound in the margins at the start of the ramp; interval bounds have the rest."""
    crown_end: Real = Field(default=0.0, ge=0, le=1)
    """The same from the end of the ramp on (section 4: beta)."""


class MixTrain(Bounding):
    """MixTrain (Wang et al. 2018)."""

    name: Literal["mixtrain"] = "mixtrain"
    counts_robust: ClassVar[bool] = False
    robust_samples: Count = Field(default=1, ge=1)
    """Images per micro-batch for which bounds are computed (k; HYDRA: 1 for large networks, 5 for small ones)."""
    robust_probability: Real = Field(default=0.8, gt=0, le=1)
    """Probability that a micro-batch has a robust term."""
    robust_weight_start: Real = Field(default=0.1, gt=0)
    """Weight of the robust term during the ramp, relative to 1 for the clean term."""
    robust_weight_end: Real = Field(default=50.0, gt=0)
    """Weight at the end of the phase, reached geometrically."""


def _name(value: Any) -> str | None:
    name = value.get("name") if isinstance(value, dict) else getattr(value, "name", None)
    return None if name is None else str(name)


# A callable discriminator, because pydantic refuses a discriminator field that has a before-validator, and every field
# of a Section has one.
Objective = Annotated[
    Annotated[Clean, Tag("clean")]
    | Annotated[Pgd, Tag("pgd")]
    | Annotated[Fgsm, Tag("fgsm")]
    | Annotated[Nfgsm, Tag("nfgsm")]
    | Annotated[FgsmPgi, Tag("fgsm_pgi")]
    | Annotated[Free, Tag("free")]
    | Annotated[Trades, Tag("trades")]
    | Annotated[Noise, Tag("noise")]
    | Annotated[Stability, Tag("stability")]
    | Annotated[SmoothAdv, Tag("smoothadv")]
    | Annotated[Ibp, Tag("ibp")]
    | Annotated[CrownIbp, Tag("crown_ibp")]
    | Annotated[MixTrain, Tag("mixtrain")],
    Discriminator(_name),
]
"""The robust training technique."""

TECHNIQUES: dict[str, type[Technique]] = {
    technique.model_fields["name"].default: technique
    for technique, _ in (get_args(tagged) for tagged in get_args(get_args(Objective)[0]))
}
"""objective.name -> its class."""
