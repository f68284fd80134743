"""Runs on this machine, with a progress display."""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from launch.display import follow
from launch.run_folder import check_same_data
from pipeline.recipe.stages import stages_of
from pipeline.run.provenance import load_run_recipe
from pipeline.run.tracking.wandb_mode import settle_mode

if TYPE_CHECKING:
    from pipeline.training.driver import Connect, RunRequest


def run_here(folder: Path, observer: str | None = None) -> int:
    """Do the rest of the run on a Ray cluster of its own; returns the exit code."""
    check_same_data(folder)
    recipe = load_run_recipe(folder)
    settle_mode(recipe.tracking.wandb)
    from launch.ray_cluster.connect import local_cluster  # imports torch and ray, which takes seconds
    from pipeline.training.driver import RunFailed, RunRequest, stages_left

    request = RunRequest(folder, observer=observer)
    if not stages_left(request, recipe):
        print(f"{folder}: already finished; see: python -m launch report {folder}")
        return 0
    try:
        run_and_show(request, local_cluster)
    except RunFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def run_and_show(request: RunRequest, connect: Connect) -> None:
    """Run the driver, with progress on standard error. Errors: as `pipeline.training.driver.run_driver`."""
    from pipeline.training.driver import run_driver

    recipe = load_run_recipe(request.run_folder)
    stop = threading.Event()
    names = [stage.name for stage in stages_of(recipe) if request.stages is None or stage.name in request.stages]
    evaluations = [recipe.objective.measure, *(attack.label for attack in recipe.evaluation.attacks)]
    arguments = (request.run_folder, names, evaluations, stop, sys.stderr)
    display = threading.Thread(target=follow, args=arguments, name="display", daemon=True)
    display.start()
    try:
        run_driver(request, connect)
    finally:
        stop.set()
        display.join(timeout=10)
