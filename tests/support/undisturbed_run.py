"""A run in processes of its own without Ray: what is undisturbed, and so what disturbed ones are compared with."""

from __future__ import annotations

import pkgutil
from pathlib import Path
from typing import TYPE_CHECKING

from launch import run_folder
from pipeline.recipe.schema import Recipe
from pipeline.recipe.stages import stages_of
from pipeline.run.lease import Leases
from tests.support.processes import run_group

if TYPE_CHECKING:
    from pipeline.distributed import Group

DEADLINE_S = 500


def new_run(folder: Path, recipe: Recipe) -> Path:
    """The run directory of a recipe, as the command line makes it."""
    run_folder.write_run_folder(folder, recipe, run_folder.check_data(recipe))
    return folder


def calm_run(folder: Path, recipe: Recipe) -> Path:
    """Do all stages with the recipe's number of workers; returns the run directory."""
    finish(new_run(folder, recipe), recipe)
    return folder


def finish(folder: Path, recipe: Recipe, observer: str | None = None) -> None:
    """Begin a run, or go on with it, to its end. `observer`, 'module:function', watches every worker."""
    leases = Leases([folder / stage.name for stage in stages_of(recipe)])
    try:
        run_group(recipe.workers.count, _work, recipe, folder, leases.token, observer, deadline_s=DEADLINE_S)
    finally:
        leases.release()


def _work(group: Group, recipe: Recipe, folder: Path, token: str, observer: str | None) -> None:
    # What takes seconds to import, the process that starts the workers has no use for.
    from pipeline.training.context import RunContext
    from pipeline.training.stage import run_stages

    watched = pkgutil.resolve_name(observer) if observer else None
    run_stages(RunContext(recipe, folder, token, group, watched), stages_of(recipe))
