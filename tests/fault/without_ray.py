"""A start of a run without Ray, which an observer in its workers may kill; its processes are forked from a warm one."""

from __future__ import annotations

import signal
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path

from pipeline.recipe.schema import Recipe
from pipeline.recipe.stages import stages_of
from pipeline.run.lease import Leases
from tests.support.processes import run_group, warm_context
from tests.support.undisturbed_run import DEADLINE_S, all_stages


def start(folder: Path, recipe: Recipe, observer: str) -> int:
    """Start or resume a run; returns the exit code of its driver, a process that holds the leases and does no more.

    It is 0 if the run is complete, and -SIGKILL if the observer, 'module:function', has killed the driver and a worker.
    """
    context = warm_context()
    ours, theirs = context.Pipe()
    driver = context.Process(target=_drive, args=([folder / stage.name for stage in stages_of(recipe)], theirs))
    driver.start()
    theirs.close()
    try:
        try:
            run_group(recipe.workers.count, all_stages, recipe, folder, ours.recv(), observer, deadline_s=DEADLINE_S)
        finally:
            ours.close()
            driver.join()
    except AssertionError:  # of a worker that lost the killed one
        if driver.exitcode != -signal.SIGKILL:
            raise
    assert driver.exitcode is not None
    return driver.exitcode


def _drive(stages: list[Path], pipe: Connection) -> None:
    leases = Leases(stages)
    pipe.send(leases.token)
    with suppress(EOFError):
        pipe.recv()  # until the other end is closed
    leases.release()
