"""Runs on this machine, with a progress display."""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from launch.display import follow
from launch.run_folder import check_same_data, has_trained_nothing, network_size
from pipeline.recipe.file import load_recipe
from pipeline.recipe.stages import stages_of
from pipeline.run.layout import RunFolder

if TYPE_CHECKING:
    from pipeline.training.driver import Connect, RunRequest


def run_here(folder: Path, observer: str | None = None) -> int:
    """Do the rest of the run on a Ray cluster of its own; returns the exit code."""
    check_same_data(folder)
    if has_trained_nothing(folder):  # or else weights that do not fit are found once Ray has started
        network_size(load_recipe(RunFolder(folder).recipe))
    from launch.ray_cluster.connect import local_cluster  # imports torch and ray, which takes seconds
    from pipeline.training.driver import RunFailed, RunRequest, stages_left

    request = RunRequest(folder, observer=observer)
    if not stages_left(request, load_recipe(RunFolder(folder).recipe)):
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

    recipe = load_recipe(RunFolder(request.run_folder).recipe)
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
