"""Does a run, here, and shows its progress."""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from launch.display import follow
from launch.run_folder import check_same_data
from pipeline.phases import stages_of
from pipeline.recipe_file import load_recipe

if TYPE_CHECKING:
    from pipeline.driver import Connect, Order


def run_here(folder: Path, observer: str | None = None) -> int:
    """Do what is left of the run on a Ray cluster of its own; returns the exit code."""
    check_same_data(folder)
    from launch.cluster import local_cluster  # loads torch and ray: seconds, and not needed above
    from pipeline.driver import Order, RunFailed, stages_left

    order = Order(folder, observer=observer)
    if not stages_left(order, load_recipe(folder / "recipe.yaml")):
        print(f"{folder}: finished already; see: python -m launch report {folder}")
        return 0
    try:
        run_and_show(order, local_cluster)
    except RunFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def run_and_show(order: Order, connect: Connect) -> None:
    """Do the order with bars or lines on standard error. Errors: as `pipeline.driver.run`."""
    from pipeline.driver import run

    recipe = load_recipe(order.run_folder / "recipe.yaml")
    stop = threading.Event()
    names = [stage.name for stage in stages_of(recipe) if order.stages is None or stage.name in order.stages]
    evaluations = [recipe.objective.measure, *(attack.label for attack in recipe.evaluation.attacks)]
    shown = (order.run_folder, names, evaluations, stop, sys.stderr)
    display = threading.Thread(target=follow, args=shown, name="display", daemon=True)
    display.start()
    try:
        run(order, connect)
    finally:
        stop.set()
        display.join(timeout=10)
