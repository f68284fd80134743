"""The schedules of the learning rate: one class per schedule, selected by its name. Imports no torch."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Discriminator, Field, PlainSerializer, Tag, model_validator

from pipeline.recipe.fields import Real, Section, name_if_default, section_of_name

FinalFraction = Annotated[Real, Field(ge=0, lt=1)]
"""What is left of the phase's learning rate at its end."""


class _Schedule(Section):
    def check_phase(self, epochs: int, warmup_epochs: float) -> None:
        """Errors: ValueError if the schedule does not fit a phase of `epochs` with this warm-up."""


class Cosine(_Schedule):
    """A cosine that reaches `final_lr_fraction` of the learning rate one step after the phase's last."""

    name: Literal["cosine"] = "cosine"
    final_lr_fraction: FinalFraction = 0.0


class Hydra(_Schedule):
    """The cosine of HYDRA's reference code: of a phase of E epochs after the warm-up, epoch e = 0, ..., E - 1 has

        lr * 0.5 * (1 + cos((e - 1) / E * pi)),

    which is `lr` in the second epoch, the same in the first and the third, and far from zero in the last of a few.
    """

    name: Literal["hydra"] = "hydra"

    def check_phase(self, epochs: int, warmup_epochs: float) -> None:
        if epochs - warmup_epochs < 2:
            raise ValueError(
                f"schedule hydra needs two epochs after the warm-up, as it is zero in the only one of a phase: epochs "
                f"{epochs}, warmup_epochs {warmup_epochs}; use more epochs or schedule=cosine"
            )


class OneCycle(_Schedule):
    """From 1/25 of the learning rate up to it, then down to `final_lr_fraction` of it at the last step, by cosines.

    The two phases of Smith and Topin (2019) as in `torch.optim.lr_scheduler.OneCycleLR`.
    """

    name: Literal["onecycle"] = "onecycle"
    final_lr_fraction: FinalFraction = 0.0

    first_fraction: ClassVar[float] = 1 / 25
    """Of the learning rate, at the first step."""
    rise: ClassVar[float] = 0.3
    """Fraction of the phase until the learning rate is highest."""

    def check_phase(self, epochs: int, warmup_epochs: float) -> None:
        if warmup_epochs:
            raise ValueError(
                f"warmup_epochs {warmup_epochs}: schedule onecycle has its own warm-up; set warmup_epochs=0"
            )


class Constant(_Schedule):
    """The learning rate of the phase throughout."""

    name: Literal["constant"] = "constant"


class Step(_Schedule):
    """The learning rate is multiplied by `factor` at every milestone."""

    name: Literal["step"] = "step"
    milestones: tuple[Real, ...] = Field(min_length=1, examples=["[0.5, 0.75]"])
    """Fractions of the phase, in (0, 1), ascending. Not epochs, as a baseline may have more of them than finetune."""
    factor: Real = Field(default=0.1, gt=0, lt=1)

    @model_validator(mode="after")
    def _milestones_ascend(self) -> Step:
        bounds = (0.0, *self.milestones, 1.0)
        if any(first >= second for first, second in pairwise(bounds)):
            raise ValueError(
                f"milestones {list(self.milestones)} must be fractions of the phase, between 0 and 1 and ascending: "
                "write [0.5, 0.75]"
            )
        return self


def _name(value: Any) -> str | None:
    name = value.get("name") if isinstance(value, dict) else getattr(value, "name", None)
    return None if name is None else str(name)


Schedule = Annotated[
    Annotated[Cosine, Tag("cosine")]
    | Annotated[Hydra, Tag("hydra")]
    | Annotated[OneCycle, Tag("onecycle")]
    | Annotated[Constant, Tag("constant")]
    | Annotated[Step, Tag("step")],
    Discriminator(_name),
    BeforeValidator(section_of_name),
    PlainSerializer(name_if_default),
]
"""A name, or a section such as {name: step, milestones: [0.5, 0.75], factor: 0.1}."""
