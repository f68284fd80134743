"""What one Ray Train worker does: set the process up, join the group, do the run's stages.

Ray restarts workers and tells who they are; checkpoints are the run directory's. The train function runs outside the
main thread, so signals are the driver's business.
"""

from __future__ import annotations

import importlib
import logging
from pathlib import Path
from typing import Any

import ray.train

from pipeline.distributed import Group, make_deterministic, pick_device
from pipeline.recipe.file import load_recipe
from pipeline.recipe.stages import stages_of
from pipeline.run.failures import Failure, record_failure
from pipeline.run.layout import RunFolder
from pipeline.run.stop import StopFile, StopRequested
from pipeline.training.context import Observer, RunContext
from pipeline.training.engine import prepare_deepspeed
from pipeline.training.stage import run_stages
from pipeline.training.watchdog import Watchdog


def resolve_observer(reference: str) -> Observer:
    """The function that 'module:function' names."""
    module, _, name = reference.partition(":")
    return getattr(importlib.import_module(module), name)


def log_to(run_folder: Path, rank: int) -> None:
    """Everything this worker says goes to logs/worker-<rank>.log of the run."""
    folder = RunFolder(run_folder).logs
    folder.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(folder / f"worker-{rank}.log")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    root.addHandler(handler)
    root.setLevel(logging.INFO)


def work(
    run_folder: str, token: str, attempt: str, stages: list[str], stop_file: str | None, observer: str | None
) -> None:
    """One worker's whole life. What is not in the arguments is read from the run directory.

    `stages` are names; the run stops once `stop_file` is there; `observer`, 'module:function', watches every rank.
    """
    folder = Path(run_folder)
    recipe = load_recipe(RunFolder(folder).recipe)
    device = pick_device(recipe.workers.device)
    train_context = ray.train.get_context()
    group = Group(train_context.get_world_rank(), train_context.get_world_size(), device)
    log_to(folder, group.rank)
    prepare_deepspeed(device)
    make_deterministic(recipe.workers.threads)
    mine = [stage for stage in stages_of(recipe) if stage.name in stages]
    watching = resolve_observer(observer) if observer is not None else None
    watchdog = Watchdog(recipe.workers.hang_timeout_s, RunFolder(folder).logs / f"worker-{group.rank}.log")
    place: dict[str, Any] = {"stage": None, "step": None}

    def observe(event: str, facts: dict[str, Any]) -> None:
        watchdog.beat()
        place.update(stage=facts["stage"], step=facts.get("step"))
        if watching is not None:
            watching(event, facts)

    stop = StopFile(Path(stop_file) if stop_file else None)
    context = RunContext(recipe, folder, token, group, observe, stop.requested)
    try:
        run_stages(context, mine)
    except StopRequested as stopped:
        logging.getLogger(__name__).info("worker %d of %d: %s", group.rank, group.world, stopped)
    except Exception as error:
        logging.getLogger(__name__).exception("worker %d of %d stops", group.rank, group.world)
        said = f"{type(error).__name__}: {error}"
        record_failure(folder, Failure(attempt, group.rank, place["stage"], place["step"], said))
        raise
    finally:
        watchdog.close()
