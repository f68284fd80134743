"""The training loop's own step (`pipeline.training.loop._step`) as a function: without Ray, files and loader."""

from __future__ import annotations

import os
from collections.abc import Iterator
from decimal import Decimal
from itertools import repeat
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist

from pipeline.data.loading.loader import Batch
from pipeline.distributed import Group
from pipeline.models import build_network
from pipeline.models.pruning.scores import Scores
from pipeline.models.state import train_only
from pipeline.recipe.schema import Recipe
from pipeline.recipe.stages import PhaseName, Stage
from pipeline.robustness.objectives import build_objective
from pipeline.run.progress import Progress
from pipeline.training.batchnorm import BatchStatistics
from pipeline.training.context import RunContext
from pipeline.training.engine import Engine, prepare_deepspeed
from pipeline.training.loop import Training, _step
from pipeline.training.stage_state import NetworkState, StageState
from pipeline.training.stopwatch import Stopwatch
from tests.support.small_recipe import small_recipe

Trains = Literal["weights", "scores", "kept weights"]
PHASES: dict[Trains, PhaseName] = {"weights": "pretrain", "scores": "prune", "kept weights": "finetune"}
"""What is trained -> the phase that trains it."""
KEEP = Decimal("0.01")
OBJECTIVES = {
    "clean": {"name": "clean"},
    "fgsm": {"name": "fgsm", "step_size": "5/255"},
    "pgd-3": {"name": "pgd", "steps": 3, "step_size": "8/765"},
    "trades-3": {"name": "trades", "steps": 3, "step_size": "8/765"},
}


def alone(where: torch.device) -> Group:
    """A process group of one, without a port."""
    os.environ["LOCAL_RANK"] = "0"  # required by DeepSpeed
    store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
    dist.init_process_group("nccl" if where.type == "cuda" else "gloo", store=store, rank=0, world_size=1)
    prepare_deepspeed(where)
    return Group(0, 1, where)


def recipe_of(
    arch: str, objective: str, micro_batch: int, parts: int, precision: str, zero_stage: int = 1, mode: str = "eager"
) -> Recipe:
    """A small recipe with those of ImageNet's settings that determine a step's cost."""
    values: dict[str, Any] = {
        "model": {"arch": arch, "num_classes": 1000},
        "threat_model": {"norm": "linf", "eps": "4/255"},
        "objective": OBJECTIVES[objective],
        "batch": {"batch_per_step": micro_batch * parts, "micro_batch": micro_batch},
        "evaluation": {"validation_steps": 5},  # the guard against overfitting requires more than one
        "sparsity": {"keep_fractions": [str(KEEP)]},
        "engine": {"zero_stage": zero_stage, "precision": precision, "mode": mode},
    }
    return small_recipe(Path("."), **values)


def random_batch(count: int, size: int) -> Batch:
    """Random images of `size` x `size` pixels, in the loader's format."""
    images = torch.randint(256, (count, 3, size, size), dtype=torch.uint8)
    images = images.contiguous(memory_format=torch.channels_last)
    return Batch(images, torch.arange(count), torch.arange(count))


class RealStep:
    """Each call is one step of the phase that trains weights, scores or kept weights, as the training loop takes it.

    `batches` are its micro-batches; a single batch is used repeatedly.
    """

    def __init__(self, recipe: Recipe, group: Group, batches: Batch | Iterator[Batch], trains: Trains) -> None:
        network = build_network(recipe.model, recipe.seed).to(group.device).train()
        phase = PHASES[trains]
        scores = Scores.attach(network, KEEP, recipe.sparsity.allocation) if trains != "weights" else None
        what = "scores" if trains == "scores" else "weights"
        train_only(network, what)
        optimisation = getattr(recipe.phases, phase)
        context = RunContext(recipe, Path("."), "token", group)
        stage = Stage(phase, phase, optimisation, recipe.objective, None, 0, trains=what)
        self.training = Training(
            stage=stage,
            context=context,
            state=StageState(NetworkState(network, scores), Engine(network, scores, optimisation, context)),
            objective=build_objective(recipe.objective, recipe.threat_model, stage.phase),
            micro_batches=repeat(batches) if isinstance(batches, Batch) else batches,
            rows=None,
            validate=lambda strength: {},
            save=lambda snapshot: None,
        )
        self.progress = Progress(0, 1000, 1000)
        self.clock = Stopwatch(group.device)
        self._statistics = BatchStatistics(self.training.state.engine.network, group)

    def __call__(self) -> None:
        self.clock.restart()
        _step(self.training, self._statistics, self.progress, self.clock)
