"""Runs on this machine, with a progress display.

The driver is a process of its own, `python -m launch.local`: it ends with its Ray cluster, and the command that waits
for it starts the next one. The command does not import Ray.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from launch.display import follow
from launch.exit_codes import exit_code_of, print_error, raise_interrupt, show_warnings
from launch.ray_cluster.environment import LOOPBACK, RAY_ENDED
from launch.ray_cluster.reaper import CLUSTER_MARK, Reaper
from launch.ray_cluster.scratch import python_for_ray
from launch.run_folder import check_same_data, has_trained_nothing, network_size
from pipeline.recipe.file import recipe_hash
from pipeline.recipe.stages import stages_of
from pipeline.run.failures import append_to_log
from pipeline.run.layout import is_done, progress_marks
from pipeline.run.provenance import load_run_recipe
from pipeline.run.tracking.wandb_mode import settle_mode

if TYPE_CHECKING:
    from pipeline.recipe.schema import Recipe
    from pipeline.training.driver import Cluster, Connect, RunRequest

log = logging.getLogger(__name__)

INTERRUPTS = (signal.SIGINT, signal.SIGTERM)
INTERRUPTED = 130
"""Exit code of a driver that SIGINT or SIGTERM has ended."""


def run_here(folder: Path, observer: str | None = None) -> int:
    """Do the rest of the run on Ray clusters of its own, one after another if Ray dies; returns the exit code."""
    print(f"{folder}: data is checked, PyTorch and Ray are loaded", file=sys.stderr, flush=True)
    check_same_data(folder)
    recipe = load_run_recipe(folder)
    settle_mode(recipe.tracking.wandb)
    if has_trained_nothing(folder):  # or else weights that do not fit are found once Ray has started
        network_size(recipe)
    stages, limit = stages_of(recipe), recipe.workers.restarts_without_progress
    if all(is_done(folder, stage) for stage in stages):
        print(f"{folder}: already finished; see: python -m launch report {folder}")
        return 0
    names = [stage.name for stage in stages]
    failures, marks = 0, progress_marks(folder, names)
    while (code := _run_driver(folder, recipe_hash(recipe), observer)) == RAY_ENDED:
        append_to_log(folder, "restarts.log", "Ray's processes ended\n")
        previous, marks = marks, progress_marks(folder, names)
        failures = 0 if marks != previous else failures + 1
        if failures > limit:
            print_error(
                f"{folder}: Ray's processes ended {failures} times in a row without a new checkpoint (is the machine "
                f"out of memory?). See {folder}/logs/, then: python -m launch resume {folder}"
            )
            return 1
        log.warning("%s: starting Ray again; restarting from the newest checkpoint", folder.name)
    if code == INTERRUPTED:
        raise KeyboardInterrupt
    if code < 0:
        name = signal.Signals(-code).name
        print_error(
            f"{folder}: its driver was ended by {name}; checkpoints are kept; continue with: "
            f"python -m launch resume {folder}"
        )
        return 1
    return code


def _run_driver(folder: Path, recipe_sha256: str, observer: str | None) -> int:
    """One driver with its Ray cluster, from start to end; returns its exit code."""
    reaper = Reaper()
    command = [python_for_ray(reaper.folder), "-m", "launch.local", str(folder), "--scratch", str(reaper.folder)]
    command += ["--recipe-sha256", recipe_sha256, *(("--observer", observer) if observer else ())]
    try:
        # The driver inherits the mask, and unblocks them once its handlers are set.
        signal.pthread_sigmask(signal.SIG_BLOCK, INTERRUPTS)
        driver = subprocess.Popen(
            command,
            env={**os.environ, **LOOPBACK, CLUSTER_MARK: reaper.mark},
            process_group=0,  # Ctrl-C reaches this process alone, which passes it on once
        )
        try:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, INTERRUPTS)
            return driver.wait()
        except KeyboardInterrupt:
            driver.send_signal(signal.SIGINT)
            driver.wait()
            raise
    finally:
        reaper.close()


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

    recipe = load_run_recipe(request.run_folder)
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


def main(arguments: list[str] | None = None) -> int:
    """The driver; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m launch.local")
    parser.add_argument("run_folder", type=Path)
    parser.add_argument("--scratch", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--recipe-sha256", required=True, metavar="HASH")
    parser.add_argument("--observer", metavar="MODULE:FUNCTION")
    options = parser.parse_args(arguments)
    show_warnings()
    for number in INTERRUPTS:
        signal.signal(number, raise_interrupt)
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, INTERRUPTS)
        return exit_code_of(lambda: _drive(options))
    except KeyboardInterrupt:
        return INTERRUPTED


def _drive(options: argparse.Namespace) -> int:
    from launch.ray_cluster.connect import local_cluster  # imports torch and ray, which takes seconds
    from pipeline.training.driver import RunFailed, RunRequest

    try:
        request = RunRequest(options.run_folder, observer=options.observer, recipe_sha256=options.recipe_sha256)
        run_and_show(request, partial(local_cluster, scratch=options.scratch))
    except RunFailed as error:
        print_error(error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
