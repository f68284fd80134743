"""A run without faults, in its own processes without Ray: the reference for runs with faults."""

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
    """Create the run directory of a recipe, as the command line does."""
    run_folder.write_run_folder(folder, recipe, run_folder.check_data(recipe))
    return folder


def calm_run(folder: Path, recipe: Recipe) -> Path:
    """Run all stages with the recipe's number of workers; returns the run directory."""
    finish(new_run(folder, recipe), recipe)
    return folder


def finish(folder: Path, recipe: Recipe, observer: str | None = None) -> None:
    """Start or resume a run and complete it. `observer`, 'module:function', observes every worker."""
    leases = Leases([folder / stage.name for stage in stages_of(recipe)])
    try:
        run_group(recipe.workers.count, all_stages, recipe, folder, leases.token, observer, deadline_s=DEADLINE_S)
    finally:
        leases.release()


def all_stages(group: Group, recipe: Recipe, folder: Path, token: str, observer: str | None) -> None:
    """One worker's part of a run."""
    # Imported here: it takes seconds, and the process that starts the workers does not need it.
    from pipeline.training.context import RunContext
    from pipeline.training.stage import run_stages

    callback = pkgutil.resolve_name(observer) if observer else None
    run_stages(RunContext(recipe, folder, token, group, callback), stages_of(recipe))
