"""The dense network of a recipe without a pretrain phase: that of `model.weights`, kept as if it had been trained."""

from __future__ import annotations

from pathlib import Path

from pipeline.data.loading import sampling
from pipeline.models import build_network
from pipeline.models.import_weights import load_foreign
from pipeline.recipe.stages import Stage
from pipeline.run import checkpoint
from pipeline.run.checkpoint import Snapshot
from pipeline.run.files import atomic_write_json, make_folder
from pipeline.run.layout import StageFolder
from pipeline.run.lease import check_token
from pipeline.run.progress import Progress
from pipeline.training.context import RunContext
from pipeline.training.stage_export import write_result
from pipeline.training.stage_state import NetworkState


def import_network(context: RunContext, stage: Stage) -> None:
    """Write what a trained stage leaves: a checkpoint, of step 0, model.safetensors, and result.json last.

    Weights and BatchNorm statistics are those of the file, unchanged. Rank 0 writes. Collective. After a crash, all is
    written again. Errors: those of `load_foreign`; LeaseHeld.
    """
    recipe = context.recipe
    train_ids, _ = context.training_samples(context.loader(recipe.data.train_file))
    per_epoch = sampling.steps_per_epoch(len(train_ids), recipe.batch.batch_per_step, recipe.extra_per_step)
    if context.group.is_first:
        _write_network(context, stage, Progress(0, per_epoch * stage.objective.steps_per_batch, 0))
    context.group.barrier()


def _write_network(context: RunContext, stage: Stage, progress: Progress) -> None:
    recipe, folder, token = context.recipe, context.folder(stage), context.token
    assert recipe.model.weights is not None, "the recipe's validation"
    network = build_network(recipe.model, recipe.seed, recipe.data.image_size)
    load_foreign(network, Path(recipe.model.weights), recipe.model, recipe.data.image_size)
    make_folder(folder)
    check_token(folder, token)  # never replace what another process owns
    plan = {"batch_per_step": recipe.batch.batch_per_step, "weights": recipe.model.weights}
    atomic_write_json(StageFolder(folder).plan, stage.describe(progress.steps_per_epoch) | plan)
    checkpoint.delete_checkpoints_after(folder, -1)  # of a start that was killed
    snapshot = Snapshot(NetworkState(network, None).state(), {}, progress)
    checkpoint.write_checkpoint(folder, snapshot, lambda: check_token(folder, token))
    write_result(context, stage, network, None, progress, selected=progress.step)
