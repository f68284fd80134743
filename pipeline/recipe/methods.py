"""The methods that make a sparse network from a recipe: their names, in recipes and in tables. Imports no torch."""

from __future__ import annotations

from fractions import Fraction
from typing import Annotated, Literal

from pydantic import BeforeValidator, PlainSerializer

from pipeline.recipe.fields import Section, name_if_default, section_of_name

Allocation = Literal["uniform", "erk", "global", "learned", "harp"]
LEARNED: tuple[Allocation, ...] = ("learned", "harp")
"""Allocations that the prune phase learns: for methods that have one."""
Structure = Literal["unstructured", "2:4", "1:4", "4:8", "1x4", "4x1", "16x16", "channel"]
"""What is kept or pruned together: nothing; N of every M inputs; blocks of outputs x inputs; or channels, in all layers
that share them."""
OF_CHANNELS: tuple[Allocation, ...] = ("global", "uniform")
"""Allocations of a budget of multiply-accumulates to groups of channels."""
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


def n_of_m(structure: Structure) -> tuple[int, int] | None:
    """(2, 4) for 2:4; None for a structure of another kind."""
    kept, separator, size = structure.partition(":")
    return (int(kept), int(size)) if separator else None


def density_of(structure: Structure) -> Fraction | None:
    """The keep_fraction that a structure determines: 1/2 for 2:4; None if it may be any."""
    pattern = n_of_m(structure)
    return None if pattern is None else Fraction(*pattern)


class Method(Section):
    """How a sparse network is made. `magnitude` alone is {name: magnitude}."""

    name: MethodName
    allocation: Allocation | None = None
    """How the budget of connections is allocated to layers; null: as sparsity.allocation says."""
    structure: Structure | None = None
    """What is kept or pruned together; null: as sparsity.structure says."""

    @property
    def label(self) -> str:
        """Unique within a recipe: magnitude, hydra-erk, hydra-2of4. Its stages' folder is named by it."""
        own = (self.allocation, self.structure and self.structure.replace(":", "of"))  # a colon is special in paths
        return "-".join([self.name, *filter(None, own)])

    @property
    def title(self) -> str:
        """For tables and charts: magnitude, HYDRA (ERK, 1x4). HYDRA with the allocation of HARP is HARP."""
        title, allocation = TITLES[self.name], self.allocation and ALLOCATION_TITLES[self.allocation]
        if (self.name, self.allocation) == ("hydra", "harp"):
            title, allocation = "HARP", None
        own = ", ".join(filter(None, (allocation, self.structure)))
        return f"{title} ({own})" if own else title


Baseline = Annotated[Method, BeforeValidator(section_of_name), PlainSerializer(name_if_default)]
HYDRA = Method(name="hydra")
"""The recipe's own."""
