"""Does a run, here, and shows its progress."""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from launch.display import follow
from launch.run_folder import check_same_data
from pipeline.recipe.file import load_recipe
from pipeline.recipe.stages import stages_of
from pipeline.run.layout import RunFolder

if TYPE_CHECKING:
    from pipeline.training.driver import Connect, RunRequest


def run_here(folder: Path, observer: str | None = None) -> int:
    """Do what is left of the run on a Ray cluster of its own; returns the exit code."""
    check_same_data(folder)
    from launch.ray_cluster.connect import local_cluster  # loads torch and ray: seconds, and not needed above
    from pipeline.training.driver import RunFailed, RunRequest, stages_left

    order = RunRequest(folder, observer=observer)
    if not stages_left(order, load_recipe(RunFolder(folder).recipe)):
        print(f"{folder}: finished already; see: python -m launch report {folder}")
        return 0
    try:
        run_and_show(order, local_cluster)
    except RunFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def run_and_show(order: RunRequest, connect: Connect) -> None:
    """Do the order with bars or lines on standard error. Errors: as `pipeline.training.driver.run_driver`."""
    from pipeline.training.driver import run_driver

    recipe = load_recipe(RunFolder(order.run_folder).recipe)
    stop = threading.Event()
    names = [stage.name for stage in stages_of(recipe) if order.stages is None or stage.name in order.stages]
    evaluations = [recipe.objective.measure, *(attack.label for attack in recipe.evaluation.attacks)]
    shown = (order.run_folder, names, evaluations, stop, sys.stderr)
    display = threading.Thread(target=follow, args=shown, name="display", daemon=True)
    display.start()
    try:
        run_driver(order, connect)
    finally:
        stop.set()
        display.join(timeout=10)
