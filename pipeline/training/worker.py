"""The main function of a Ray Train worker: sets up the process, joins the group, runs the stages.

Ray assigns ranks and restarts workers; checkpoints are in the run directory. Ray calls the function outside the main
thread, so it cannot handle signals; the driver does.
"""

from __future__ import annotations

import importlib
import logging
from pathlib import Path
from typing import Any

import ray.train

from pipeline.distributed import Group, failure_text, make_deterministic, pick_device
from pipeline.recipe.stages import stages_of
from pipeline.run.failures import Failure, record_failure
from pipeline.run.files import make_folder, open_to_append
from pipeline.run.layout import RunFolder
from pipeline.run.provenance import load_run_recipe
from pipeline.run.stop import StopFile, StopRequested
from pipeline.training.context import Observer, RunContext
from pipeline.training.engine import prepare_deepspeed
from pipeline.training.stage import run_stages
from pipeline.training.watchdog import Watchdog


def resolve_observer(reference: str) -> Observer:
    """The function that 'module:function' names."""
    module, _, name = reference.partition(":")
    return getattr(importlib.import_module(module), name)


def log_to_file(run_folder: Path, rank: int) -> None:
    """Send all logging of this process to logs/worker-<rank>.log of the run."""
    folder = RunFolder(run_folder).logs
    make_folder(folder)
    handler = logging.StreamHandler(open_to_append(folder / f"worker-{rank}.log"))
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    root.addHandler(handler)
    root.setLevel(logging.INFO)


def run_worker(
    run_folder: str, token: str, attempt: str, stages: list[str], stop_file: str | None, observer: str | None
) -> None:
    """Run the stages as one worker; the recipe is read from the run directory.

    `stages` are names; the run stops once `stop_file` exists; `observer`, 'module:function', is called on every rank.
    """
    folder = Path(run_folder)
    recipe = load_run_recipe(folder)
    train_context = ray.train.get_context()
    log_to_file(folder, train_context.get_world_rank())
    device = pick_device(recipe.workers.device)
    group = Group(train_context.get_world_rank(), train_context.get_world_size(), device)
    prepare_deepspeed(device)
    make_deterministic(recipe.workers.threads)
    selected = [stage for stage in stages_of(recipe) if stage.name in stages]
    callback = resolve_observer(observer) if observer is not None else None
    watchdog = Watchdog(recipe.workers.hang_timeout_s, RunFolder(folder).logs / f"worker-{group.rank}.log")
    position: dict[str, Any] = {"stage": None, "step": None}

    def observe(event: str, facts: dict[str, Any]) -> None:
        watchdog.beat()
        position.update(stage=facts["stage"], step=facts.get("step"))
        if callback is not None:
            callback(event, facts)

    stop = StopFile(Path(stop_file) if stop_file else None)
    context = RunContext(recipe, folder, token, group, observe, stop.requested)
    try:
        run_stages(context, selected)
    except StopRequested as stop_request:
        logging.getLogger(__name__).info("worker %d of %d: %s", group.rank, group.world, stop_request)
    except Exception as error:
        logging.getLogger(__name__).exception("worker %d of %d stops", group.rank, group.world)
        record_failure(folder, Failure(attempt, group.rank, position["stage"], position["step"], failure_text(error)))
        raise
    finally:
        watchdog.close()
