"""What a check is given, and what it finds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal

from pipeline.recipe.schema import Recipe, parse_recipe

Status = Literal["pass", "warn", "fail"]

ProgressCallback = Callable[[int, int], None]
"""Called with (done, total); a check that calls it may take longer than its deadline, as long as `done` grows."""


@dataclass(frozen=True)
class Outcome:
    """What one check has found, for one line."""

    status: Status
    text: str
    fix: str = ""
    """What to do; empty for a pass, or if `text` says it."""

    def line(self, name: str) -> str:
        fix = f"; fix: {self.fix}" if self.fix else ""
        return f"{self.status}  {name}: {' '.join((self.text + fix).split())}"


@dataclass(frozen=True)
class Subject:
    """What is checked: this machine, and a recipe or run if one is named. Plain values, to be sent to processes."""

    values: dict[str, Any] | None = None
    """The recipe as plain values, with absolute paths."""
    run: str | None = None
    """The run's folder, if `values` are a run's."""
    on_slurm: bool = False
    """Whether the run is to be on SLURM."""
    reads_files: bool = True
    """Whether the data files are read completely: on one node of a job only."""

    @cached_property
    def recipe(self) -> Recipe | None:
        return None if self.values is None else parse_recipe(self.values, "the recipe", of_a_run=self.run is not None)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Check:
    """One check, done in a process of its own."""

    name: str
    function: str
    """'module:function', called with (Subject, ProgressCallback); returns an Outcome."""
    deadline_s: float
    """Without progress."""
