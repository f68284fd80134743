"""The schedules of the learning rate: one class per schedule, selected by its name. Imports no torch."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, PlainSerializer, Tag, model_validator

from pipeline.recipe.fields import Real, Section


class Cosine(Section):
    """A cosine that reaches zero after the phase's last step."""

    name: Literal["cosine"] = "cosine"


class Constant(Section):
    """The learning rate of the phase throughout."""

    name: Literal["constant"] = "constant"


class Step(Section):
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


def _section(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


def _plain(schedule: Section) -> Any:
    """A schedule without keys is its name, as in recipes from before there were others."""
    values = schedule.model_dump(mode="json")
    return values["name"] if len(values) == 1 else values


def _name(value: Any) -> str | None:
    name = value.get("name") if isinstance(value, dict) else getattr(value, "name", None)
    return None if name is None else str(name)


Schedule = Annotated[
    Annotated[Cosine, Tag("cosine")] | Annotated[Constant, Tag("constant")] | Annotated[Step, Tag("step")],
    Discriminator(_name),
    BeforeValidator(_section),
    PlainSerializer(_plain),
]
"""`cosine`, `constant` or {name: step, milestones: [0.5, 0.75], factor: 0.1}."""
