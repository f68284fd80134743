"""The methods that make a sparse network from a recipe: their names, in recipes and in tables. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, PlainSerializer

from pipeline.recipe.fields import Section, name_if_default, section_of_name

Allocation = Literal["uniform", "erk", "global", "learned", "harp"]
LEARNED: tuple[Allocation, ...] = ("learned", "harp")
"""Allocations that the prune phase learns: for methods that have one."""
MaskSource = Allocation | Literal["binary"]
"""How masks follow from scores: by rank within an allocation; or scores are 1 where a connection is kept, and else 0,
for methods that choose connections otherwise."""
MethodName = Literal["hydra", "s2ap", "magnitude", "random", "snip", "gradual", "flying_bird", "flying_bird_plus"]
PRUNING: tuple[MethodName, ...] = ("hydra", "s2ap")
"""Methods that learn scores in the prune phase, and then finetune. The others are one stage."""
FROM_SCRATCH: tuple[MethodName, ...] = ("flying_bird", "flying_bird_plus")
"""Methods that need no dense network, and have the epochs of all of HYDRA's phases."""
DYNAMIC: tuple[MethodName, ...] = ("gradual", *FROM_SCRATCH)
"""Methods whose mask changes while weights train."""
TITLES: dict[MethodName, str] = {
    "hydra": "HYDRA",
    "s2ap": "S2AP",
    "magnitude": "magnitude",
    "random": "random",
    "snip": "SNIP",
    "gradual": "gradual",
    "flying_bird": "Flying Bird",
    "flying_bird_plus": "Flying Bird+",
}
ALLOCATION_TITLES: dict[Allocation, str] = {
    "uniform": "uniform",
    "erk": "ERK",
    "global": "global",
    "learned": "learned",
    "harp": "HARP",
}


class Method(Section):
    """How a sparse network is made. `magnitude` alone is {name: magnitude}."""

    name: MethodName
    allocation: Allocation | None = None
    """How the budget of connections is allocated to layers; null: as sparsity.allocation says."""

    @property
    def label(self) -> str:
        """Unique within a recipe: magnitude, hydra-erk. Its stages' folder is named by it."""
        return self.name if self.allocation is None else f"{self.name}-{self.allocation}"

    @property
    def title(self) -> str:
        """For tables and charts: magnitude, HYDRA (ERK). HYDRA with the allocation of HARP is HARP."""
        title = TITLES[self.name]
        if (self.name, self.allocation) == ("hydra", "harp"):
            return "HARP"
        return title if self.allocation is None else f"{title} ({ALLOCATION_TITLES[self.allocation]})"


Baseline = Annotated[Method, BeforeValidator(section_of_name), PlainSerializer(name_if_default)]
HYDRA = Method(name="hydra")
"""The recipe's own."""
