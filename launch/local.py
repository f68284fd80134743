"""Runs on this machine, with a progress display."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from launch.display import follow
from launch.run_folder import check_same_data, has_trained_nothing, network_size
from pipeline.recipe.file import load_recipe
from pipeline.recipe.stages import stages_of
from pipeline.run.layout import RunFolder

if TYPE_CHECKING:
    from pipeline.recipe.schema import Recipe
    from pipeline.training.driver import Cluster, Connect, RunRequest


def run_here(folder: Path, observer: str | None = None) -> int:
    """Do the rest of the run on a Ray cluster of its own; returns the exit code."""
    print(f"{folder}: data is checked, PyTorch and Ray are loaded", file=sys.stderr, flush=True)
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


def _announced(connect: Connect) -> Connect:
    """`connect`, with a line before each part of a start that takes seconds without any other."""

    @contextmanager
    def announced(recipe: Recipe) -> Iterator[Cluster]:
        print("Ray starts", file=sys.stderr, flush=True)
        with connect(recipe) as cluster:
            print(f"workers start: {cluster.workers}", file=sys.stderr, flush=True)
            yield cluster

    return announced


def run_and_show(request: RunRequest, connect: Connect) -> None:
    """Run the driver, with progress on standard error. Errors: as `pipeline.training.driver.run_driver`."""
    from pipeline.training.driver import run_driver

    recipe = load_recipe(RunFolder(request.run_folder).recipe)
    stop = threading.Event()
    stages = [stage for stage in stages_of(recipe) if request.stages is None or stage.name in request.stages]
    evaluations = {stage.name: stage.evaluations for stage in stages}
    arguments = (request.run_folder, evaluations, stop, sys.stderr)
    display = threading.Thread(target=follow, args=arguments, name="display", daemon=True)
    display.start()
    try:
        run_driver(request, _announced(connect))
    finally:
        stop.set()
        display.join(timeout=10)
