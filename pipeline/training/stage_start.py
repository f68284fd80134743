"""The start of a stage: weights of another stage, imported or from the seed, initial scores and perturbations."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

from pipeline.models import Network
from pipeline.models.ema import overlaid
from pipeline.models.import_weights import load_foreign
from pipeline.models.pruning.drop_and_grow import first_masks
from pipeline.models.pruning.score_init import FirstScore, first_scores, zero
from pipeline.models.pruning.scores import Scores
from pipeline.models.state import load_state
from pipeline.recipe.objective import FgsmPgi
from pipeline.recipe.stages import Stage
from pipeline.robustness.objectives import build_objective
from pipeline.run import checkpoint
from pipeline.run.layout import StageFolder
from pipeline.run.progress import Progress
from pipeline.run.records import StageResult
from pipeline.training.batches import FreeNoise, crop_function, micro_batches
from pipeline.training.context import RunContext
from pipeline.training.engine import autocast_of
from pipeline.training.perturbation_memory import PerturbationMemory
from pipeline.training.snip import connection_sensitivity
from pipeline.training.stage_state import Perturbations


def load_start(context: RunContext, stage: Stage, network: Network) -> Scores | None:
    """Load the weights that a stage starts from, and attach its scores. Collective.

    The weights are those of the selected checkpoint of the stage that it starts from, else those of `model.weights`,
    else those initialised from the seed. A sparse network that trains from scratch has the last.
    """
    recipe = context.recipe
    if stage.keep_fraction is None:
        if recipe.model.weights is not None:
            load_foreign(network, Path(recipe.model.weights), recipe.model, recipe.data.image_size)
        return None
    if stage.starts_from is None:
        init = score_init(context, stage, network)
        return Scores.attach(network, stage.keep_fraction, stage.mask_source, init, stage.structure, stage.round_to)
    source = context.run_folder / stage.starts_from
    snapshot = checkpoint.read_checkpoint(
        checkpoint.folder_of(source, StageResult.read(StageFolder(source).result).selected_step or 0)
    )
    tensors = overlaid(snapshot.model, snapshot.train_state)
    if stage.scores_from == "source":
        scores = Scores.attach(network, stage.keep_fraction, stage.mask_source, zero, stage.structure, stage.round_to)
        load_state(network, tensors, scores)
        return scores
    load_state(network, tensors)
    init = score_init(context, stage, network)
    return Scores.attach(network, stage.keep_fraction, stage.mask_source, init, stage.structure, stage.round_to)


def score_init(context: RunContext, stage: Stage, network: Network) -> FirstScore:
    """The initial scores of a stage that has no checkpoint yet. SNIP uses the images of the first step."""
    recipe, group = context.recipe, context.group
    if stage.scores_from == "random" and stage.is_dynamic:
        assert stage.keep_fraction is not None
        init = first_scores("random", recipe.seed)
        return first_masks(network, stage.keep_fraction, stage.allocation, init, stage.structure)
    if stage.scores_from != "snip":
        return first_scores(stage.scores_from, recipe.seed)
    loader = context.loader(recipe.data.train_file)
    train_ids, _ = context.training_samples(loader)
    objective = build_objective(stage.objective, recipe.threat_model, stage.section)
    with closing(micro_batches(context, stage, loader, train_ids, 0, 1)) as batches:
        dense, autocast = network.to(group.device), autocast_of(recipe, group.device)
        seed, key = recipe.seed, stage.random_key
        scores = connection_sensitivity(dense, batches, objective, autocast, group, seed=seed, stage=key)
    return lambda name, weight: scores[name]


def build_perturbations(context: RunContext, stage: Stage, progress: Progress) -> Perturbations | None:
    """What the stage's objective carries, as at its start; PGD, which overfitting leads to, remembers nothing."""
    objective, recipe = stage.objective, context.recipe
    if objective.carries_noise:
        return FreeNoise(context)
    if not isinstance(objective, FgsmPgi) or progress.level > 0:
        return None
    loader = context.loader(recipe.data.train_file)
    return PerturbationMemory(
        context.group,
        context.training_samples(loader)[0],
        crop_function(recipe, loader),
        image_size=recipe.data.image_size,
        first_epoch=stage.first_epoch,
        steps_per_epoch=progress.steps_per_epoch,
        reset_epochs=objective.reset_epochs,
    )
