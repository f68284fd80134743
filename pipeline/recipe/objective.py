"""What a network shall withstand, and the training technique for it: two sections of a recipe. No torch here."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from pipeline.recipe.fields import Pixels, Section


class ThreatModel(Section):
    """Norm and radius of the ball that an adversary may move an image in."""

    norm: Literal["linf", "l2"]
    eps: Pixels

    @model_validator(mode="after")
    def _eps_positive(self) -> ThreatModel:
        if self.eps <= 0:
            raise ValueError(f"eps {self.eps} must be positive; use objective.name=clean to train without attack")
        if self.norm == "linf" and self.eps >= 1:
            raise ValueError(
                f"eps {self.eps} lets every pixel take any value; pixels are in [0, 1]: write 4/255, not 4"
            )
        return self


ATTACKING = ("pgd", "fgsm", "nfgsm", "free", "trades", "smoothadv")
"""Objectives that craft adversarial examples."""
ONE_STEP = ("fgsm", "nfgsm", "free")
"""Objectives that may overfit to one step."""
SMOOTHING = ("noise", "stability", "smoothadv")
"""Objectives whose network is smoothed with Gaussian noise, and certified so."""
PROVING = ("ibp", "crown_ibp", "mixtrain")
"""Objectives that train by sound bounds, and are judged by them."""


class Objective(Section):
    """The robust training technique."""

    name: Literal[
        "clean",
        "pgd",
        "fgsm",
        "nfgsm",
        "free",
        "trades",
        "noise",
        "stability",
        "smoothadv",
        "ibp",
        "crown_ibp",
        "mixtrain",
    ]
    steps: int = Field(default=1, ge=1)
    step_size: Pixels | None = None
    eps_warmup: float = Field(default=0.0, ge=0, lt=1)
    """Share of the pretrain phase over which eps and step_size grow from zero, linearly; 0 is the whole eps at once."""
    beta: float = Field(default=6.0, gt=0)
    """Weight of the KL term of TRADES (Zhang et al. 2019, eq. 5: beta is their 1/lambda) and of stability training."""
    replays: int = Field(default=4, ge=1)
    """free: steps in a row that each batch is taken for (m in Shafahi et al. 2019); an epoch has m times as many."""
    overfitting_guard: float | None = Field(default=0.5, gt=0, le=1)
    """fgsm, nfgsm, free: smallest allowed ratio of accuracy under PGD to that under one step; null: no guard."""
    noise_magnitude: float = Field(default=2.0, gt=0)
    """Largest noise per pixel of N-FGSM, in multiples of eps (k in de Jorge et al. 2022)."""
    sigma: Pixels | None = None
    """Standard deviation of the Gaussian noise that the network is smoothed with."""
    noise_samples: int = Field(default=1, ge=1)
    """Noises per image of SmoothAdv (m in Salman et al. 2019): a forward has that many times as many images."""

    eps_ramp: float = Field(default=0.6, ge=0, le=1)
    """ibp, crown_ibp, mixtrain: share of pretrain over which eps rises from 0; it is whole in the other phases."""
    kappa_start: float = Field(default=1.0, ge=0, le=1)
    """ibp, crown_ibp: weight of clean cross-entropy as the ramp begins; the worst case has the rest."""
    kappa_end: float = Field(default=0.5, ge=0, le=1)
    """The same from the ramp's end on (Gowal et al. 2018, section 4)."""
    crown_start: float = Field(default=1.0, ge=0, le=1)
    """crown_ibp: share of the linear bound in the margins as the ramp begins; intervals have the rest."""
    crown_end: float = Field(default=0.0, ge=0, le=1)
    """The same from the ramp's end on (Zhang et al. 2020, section 4: beta)."""
    robust_samples: int = Field(default=1, ge=1)
    """mixtrain: images of a micro-batch that are bounded (k; HYDRA: 1 for large networks, 5 for small ones)."""
    robust_probability: float = Field(default=0.8, gt=0, le=1)
    """mixtrain: chance of a micro-batch to have a robust term."""
    robust_weight_start: float = Field(default=0.1, gt=0)
    """mixtrain: weight of the robust term against the clean one's 1 during the ramp."""
    robust_weight_end: float = Field(default=50.0, gt=0)
    """The weight that it has grown to at the end, geometrically."""

    @property
    def measure(self) -> str:
        """How a network that was trained so is judged: the name of its evaluation's files."""
        return "certified" if self.name in SMOOTHING else "verified" if self.name in PROVING else "pgd"

    @property
    def guarded(self) -> bool:
        """Whether training is watched for catastrophic overfitting."""
        return self.name in ONE_STEP and self.overfitting_guard is not None

    @property
    def steps_per_batch(self) -> int:
        """Optimizer steps in a row that are taken on the same images."""
        return self.replays if self.name == "free" else 1

    @model_validator(mode="after")
    def _steps_fit(self) -> Objective:
        if self.name in ("fgsm", "nfgsm", "free") and self.steps != 1:
            raise ValueError(f"{self.name} takes one step, got steps={self.steps}; use name: pgd for more")
        if self.name in ATTACKING and self.step_size is None:
            raise ValueError(f"{self.name} needs step_size, for example 1/255")
        if self.step_size is not None and self.step_size <= 0:
            raise ValueError(f"step_size {self.step_size} must be positive")
        if self.eps_warmup and self.name not in ATTACKING:
            raise ValueError(f"eps_warmup {self.eps_warmup}: {self.name} has no attack to warm up; remove this key")
        return self

    @model_validator(mode="after")
    def _sigma_fits(self) -> Objective:
        if self.name in SMOOTHING and self.sigma is None:
            raise ValueError(f"{self.name} needs sigma, for example 1/4")
        if self.sigma is not None and self.sigma <= 0:
            raise ValueError(f"sigma {self.sigma} must be positive")
        return self
