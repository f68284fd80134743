"""What one Ray Train worker does: set the process up, join the group, walk through the job's stages.

Ray restarts workers and tells who they are; checkpoints are the run directory's. The train function runs outside the
main thread, so signals are the driver's business.
"""

from __future__ import annotations

import importlib
import logging
from pathlib import Path

import ray.train
import torch

from pipeline.engine import prepare_deepspeed
from pipeline.group import Group, pick_device
from pipeline.job import Job
from pipeline.loop import Observer, unobserved
from pipeline.phases import stages_of
from pipeline.recipe_file import load_recipe
from pipeline.stage import run_stages


def resolve_observer(reference: str | None) -> Observer:
    if reference is None:
        return unobserved
    module, _, name = reference.partition(":")
    return getattr(importlib.import_module(module), name)


def log_to(run_folder: Path, rank: int) -> None:
    """Everything this worker says goes to logs/worker-<rank>.log of the run."""
    folder = run_folder / "logs"
    folder.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(folder / f"worker-{rank}.log")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    root.addHandler(handler)
    root.setLevel(logging.INFO)


def make_repeatable(threads: int) -> None:
    """Fixed thread count and deterministic kernels: part of what makes a run repeat bit for bit."""
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True)
    # Filling finds bugs, at the price of a pass over every buffer.
    torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]
    torch.backends.cudnn.benchmark = False
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


def work(run_folder: str, token: str, stages: list[str], observer: str | None) -> None:
    """One worker's whole life. What is not in the arguments is read from the run directory.

    `stages` are names; `observer`, 'module:function', watches every rank (tests).
    """
    folder = Path(run_folder)
    recipe = load_recipe(folder / "recipe.yaml")
    device = pick_device(recipe.workers.device)
    context = ray.train.get_context()
    group = Group(context.get_world_rank(), context.get_world_size(), device)
    log_to(folder, group.rank)
    prepare_deepspeed(device)
    make_repeatable(recipe.workers.threads)
    mine = [stage for stage in stages_of(recipe) if stage.name in stages]
    try:
        run_stages(Job(recipe, folder, token, group, resolve_observer(observer)), mine)
    except Exception:
        logging.getLogger(__name__).exception("worker %d of %d stops", group.rank, group.world)
        raise
