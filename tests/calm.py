"""A run in processes of its own without Ray: what is undisturbed, and so what disturbed ones are compared with."""

from __future__ import annotations

from pathlib import Path

from launch import run_folder
from pipeline.group import Group
from pipeline.job import Job
from pipeline.lease import Leases
from pipeline.loop import Observer, unobserved
from pipeline.phases import stages_of
from pipeline.recipe import Recipe
from pipeline.stage import run_stages
from tests.dist.processes import run_group

DEADLINE_S = 500


def new_run(folder: Path, recipe: Recipe) -> Path:
    """The run directory of a recipe, as the command line makes it."""
    run_folder.write(folder, recipe, run_folder.check_data(recipe))
    return folder


def calm_run(folder: Path, recipe: Recipe) -> Path:
    """Do all stages with the recipe's number of workers; returns the run directory."""
    finish(new_run(folder, recipe), recipe)
    return folder


def finish(folder: Path, recipe: Recipe, observer: Observer = unobserved) -> None:
    """Begin a run, or go on with it, to its end."""
    leases = Leases([folder / stage.name for stage in stages_of(recipe)])
    try:
        run_group(recipe.workers.count, _work, recipe, folder, leases.token, observer, deadline_s=DEADLINE_S)
    finally:
        leases.release()


def _work(group: Group, recipe: Recipe, folder: Path, token: str, observer: Observer) -> None:
    run_stages(Job(recipe, folder, token, group, observer), stages_of(recipe))
