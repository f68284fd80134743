"""The section of a phase: how its network is optimised and averaged, and how large its images are. Imports no torch."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field, model_validator

from pipeline.recipe.fields import Count, Real, Section
from pipeline.recipe.learning_rate import Cosine, Schedule
from pipeline.recipe.objective import Objective

GRAIN = 32
"""Progressive resizing uses multiples of this size, in pixels, so that few distinct sizes occur."""


class Resolution(Section):
    """Progressive resizing: training images grow to data.image_size. Epochs count from 0, the phase's first."""

    smallest: Count = Field(gt=0, multiple_of=GRAIN)
    """Height and width of the images, in pixels, up to the epoch `grows_from`; a multiple of 32."""
    grows_from: Count = Field(default=0, ge=0)
    """Last epoch of the smallest images, which then grow in steps of 32 pixels, linearly in epochs."""
    full_from: Count = Field(ge=1)
    """First epoch at data.image_size."""

    @model_validator(mode="after")
    def _grows(self) -> Resolution:
        if self.full_from <= self.grows_from:
            raise ValueError(f"full_from {self.full_from} must be a later epoch than grows_from {self.grows_from}")
        return self


class Phase(Section):
    """Optimisation of one phase."""

    epochs: Count = Field(ge=1)
    lr: Real = Field(gt=0)
    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    """SGD with momentum, or Adam with betas 0.9 and 0.999, which HYDRA uses for MixTrain and CROWN-IBP. Both add weight
    decay to the gradient; AdamW's is decoupled."""
    momentum: Real = Field(default=0.9, ge=0, lt=1)
    """For sgd only."""
    weight_decay: Real = Field(default=1e-4, ge=0)
    warmup_epochs: Real = Field(default=0.0, ge=0)
    schedule: Schedule = Cosine()
    objective: Objective | None = None
    """Training technique of this phase; null means the recipe's."""
    ema_epochs: Real | None = Field(default=None, gt=0, le=10**6)
    """Horizon of an exponential moving average of the trained tensors, which becomes the phase's result: the weight of
    a step falls to 1/e within so many epochs, however many steps these have. null: no average."""
    ema_decay: Real | None = Field(default=None, gt=0, lt=1)
    """The earlier form of `ema_epochs`, which depends on the batch size: decay per step."""
    resolution: Resolution | None = None
    """Progressive resizing, which trains faster; null: every image has data.image_size."""

    @property
    def is_averaged(self) -> bool:
        return self.ema_epochs is not None or self.ema_decay is not None

    def ema_decay_per_step(self, steps_per_epoch: int) -> float | None:
        """Decay per step of the moving average, in [0, 1); None if there is none."""
        if self.ema_epochs is not None:
            return math.exp(-1.0 / (self.ema_epochs * steps_per_epoch))
        return self.ema_decay

    @model_validator(mode="after")
    def _one_average(self) -> Phase:
        if self.ema_epochs is not None and self.ema_decay is not None:
            raise ValueError(
                f"ema_epochs {self.ema_epochs} and ema_decay {self.ema_decay} are two horizons of one average; "
                "remove ema_decay"
            )
        return self

    @model_validator(mode="after")
    def _last_epochs_have_full_images(self) -> Phase:
        if self.resolution is not None and self.resolution.full_from >= self.epochs:
            raise ValueError(
                f"resolution.full_from {self.resolution.full_from} must be one of the phase's epochs, 1 to "
                f"{self.epochs - 1}: networks are evaluated at data.image_size"
            )
        return self

    @model_validator(mode="after")
    def _warmup_fits(self) -> Phase:
        if self.warmup_epochs >= self.epochs:
            raise ValueError(f"warmup_epochs {self.warmup_epochs} must be less than epochs {self.epochs}")
        self.schedule.check_phase(self.epochs, self.warmup_epochs)
        return self
