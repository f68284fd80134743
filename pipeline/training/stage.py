"""Runs the stages of a recipe: restore, start or import, train, export, evaluate.

Works inside any process group: Ray's (`pipeline.training.worker`), or one of a test or benchmark.
"""

from __future__ import annotations

import logging
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path

from pipeline.data.loading import sampling
from pipeline.models import build_network, check_micro_batch, check_size
from pipeline.models.ema import Ema, overlaid
from pipeline.models.pruning.mask_drift import MaskDrift
from pipeline.models.pruning.score_init import first_scores, zero
from pipeline.models.pruning.scores import Scores, check_structures
from pipeline.models.state import load_state, train_only
from pipeline.recipe.stages import Stage
from pipeline.robustness.objectives import build_objective
from pipeline.robustness.objectives.s2ap import sharpness_aware
from pipeline.robustness.overfitting import CatastrophicOverfitting
from pipeline.run import checkpoint
from pipeline.run.checkpoint import Snapshot, Writer
from pipeline.run.files import atomic_write_json, make_folder
from pipeline.run.layout import StageFolder, unevaluated
from pipeline.run.lease import check_token
from pipeline.run.progress import Progress
from pipeline.run.stop import StopRequested
from pipeline.run.tracking.metrics import Tracker, truncate_rows
from pipeline.training.batches import micro_batches, replayed
from pipeline.training.context import RunContext
from pipeline.training.dynamic_masks import build_dynamic_masks
from pipeline.training.engine import Engine
from pipeline.training.health import check_worker
from pipeline.training.imported_network import import_network
from pipeline.training.loop import Training, train
from pipeline.training.rollback import roll_back
from pipeline.training.stage_evaluation import build_validation, check_honesty, evaluate_stage
from pipeline.training.stage_export import write_result
from pipeline.training.stage_start import build_perturbations, load_start
from pipeline.training.stage_state import NetworkState, StageState, restored
from pipeline.training.stage_tracking import log_finished_parts, stage_tracker, summary_of
from pipeline.training.trials import choose_trial

log = logging.getLogger(__name__)


def run_stages(context: RunContext, stages: list[Stage]) -> None:
    """Run the stages in order, without those that are finished. Collective.

    Errors: StopRequested, once a checkpoint is written after a stop request; Unhealthy.
    """
    try:
        check_worker(context)
        for stage in stages:
            _run_stage(context, stage)
    finally:
        context.close()


def _run_stage(context: RunContext, stage: Stage) -> None:
    folder = context.folder(stage)
    to_train = context.group.broadcast(not StageFolder(folder).result.exists())
    to_evaluate = context.group.broadcast(unevaluated(context.run_folder, stage))
    if not to_train and not to_evaluate:
        return
    make_folder(folder)
    own = None
    if to_train and not stage.epochs:
        (choose_trial if stage.trials else import_network)(context, stage)
    elif to_train and context.group.is_first:
        own = _own_checkpoint(folder, context.token)
    # Only now that the rows are those of the checkpoint. One wandb run for training and test.
    with stage_tracker(context, stage) as tracker:
        if to_train:
            if stage.epochs:
                _train_stage(context, stage, own, tracker)
            context.observe("stage_finished", {"stage": stage.name})
        log_finished_parts(context, stage, tracker)
        if to_evaluate:
            check_honesty(context, stage)
            for label, result in evaluate_stage(context, stage, to_evaluate):
                if tracker is not None:
                    tracker.summary(summary_of(stage, label, result))


def _own_checkpoint(folder: Path, token: str) -> Snapshot | None:
    """The stage's newest intact checkpoint; checkpoints and rows beyond it are removed.

    Errors: LeaseHeld if another process has taken the stage; ValueError if it has checkpoints but none is intact.
    """
    check_token(folder, token)  # never remove what another process owns
    own = checkpoint.read_newest_checkpoint(folder)
    if own is None and (lost := checkpoint.committed_steps(folder)):
        raise ValueError(
            f"{folder}: none of its checkpoints is intact (steps {', '.join(map(str, lost))}; logs/worker-0.log says "
            "what is wrong with each); restore one, or delete its step-* folders to train the stage from its start, "
            "then resume"
        )
    checkpoint.delete_checkpoints_after(folder, own.progress.step if own else 0)
    truncate_rows(StageFolder(folder).metrics, own.progress.step if own else 0)
    return own


def _train_stage(context: RunContext, stage: Stage, own: Snapshot | None, tracker: Tracker | None) -> None:
    """Train to the end; after catastrophic overfitting, roll back and train with a stronger attack."""
    level = 0
    while True:
        try:
            return _attempt(StageTrainer(context, stage, tracker, level), own)
        except CatastrophicOverfitting as overfitting:
            own, level = roll_back(context, stage, overfitting, tracker)


def _attempt(trainer: StageTrainer, own: Snapshot | None) -> None:
    with closing(trainer):
        trainer.restore(own)
        trainer.run()
        trainer.finish()


class StageTrainer:
    """Trains one stage: `restore` its state, `run` the remaining steps, `finish` with its result; then `close`.

    `level` counts how often the attack was strengthened after catastrophic overfitting.
    """

    def __init__(self, context: RunContext, stage: Stage, tracker: Tracker | None, level: int = 0) -> None:
        self._context, self._stage, self._tracker, self._level = context, stage, tracker, level
        self._folder = context.folder(stage)
        self._writer = Writer(self._folder, context.recipe.checkpoint.keep, self._guard)
        self._resources = ExitStack()

    def restore(self, own: Snapshot | None) -> None:
        """Build every part of the stage's state, from its own checkpoint or from its start. Collective.

        Rank 0 passes the checkpoint; the others read it. Errors: ValueError if its numbers of steps do not fit.
        """
        context, stage, recipe, group = self._context, self._stage, self._context.recipe, self._context.group
        network = build_network(recipe.model, recipe.seed, recipe.data.image_size)
        size, images = recipe.data.image_size, recipe.batch.micro_batch
        check_micro_batch(recipe.model, size, size, images)
        for key, growth in recipe.growing.items():
            check_size(recipe.model, size, growth.smallest, f"{key}.smallest")
            check_micro_batch(recipe.model, size, growth.smallest, images)
        sparsity = recipe.sparsity
        check_structures(network, sparsity.structures, sparsity.keep_fractions, sparsity.round_to)
        if step := group.broadcast(own.progress.step if own else 0):
            own = own or checkpoint.read_checkpoint(checkpoint.folder_of(self._folder, step))
            keep, source = stage.keep_fraction, stage.mask_source
            structure = stage.structure, stage.round_to
            scores = None if keep is None else Scores.attach(network, keep, source, zero, *structure)
        else:
            scores = load_start(context, stage, network)
        network_state, drift, penalty = restored(NetworkState(network, scores), own), None, None
        if stage.trains == "scores":
            assert scores is not None
            penalty = scores.follow_shares()
            if group.is_first:
                drift = restored(MaskDrift(scores, first_scores(stage.scores_from, recipe.seed), group.device), own)
        network.to(group.device).train()
        train_only(network, stage.trains, recipe.sparsity.batchnorm)
        if scores is not None:
            scores.refresh()  # on the training device, with its rounding
        engine = Engine(network, scores, stage.optimisation, context)
        self._resources.callback(engine.close)
        self._network, self._progress = network, self._position(own)
        decay = stage.optimisation.ema_decay_per_step(self._progress.steps_per_epoch)
        noise = build_perturbations(context, stage, self._progress)
        dynamic_masks = None
        if stage.is_dynamic:
            assert scores is not None
            dynamic_masks = build_dynamic_masks(stage, recipe.seed, scores, engine, self._progress)
            dynamic_masks = restored(dynamic_masks, own)
        self._state = StageState(
            network=network_state,
            engine=restored(engine, own),
            ema=restored(Ema(network, decay, scores), own) if decay is not None else None,
            noise=restored(noise, own) if noise is not None else None,
            drift=drift,
            penalty=None if penalty is None else restored(penalty, own),
            dynamic_masks=dynamic_masks,
        )

    def _position(self, own: Snapshot | None) -> Progress:
        context, recipe = self._context, self._context.recipe
        train_ids, _ = context.training_samples(context.loader(recipe.data.train_file))
        per_data_epoch = sampling.steps_per_epoch(len(train_ids), recipe.batch.batch_per_step, recipe.extra_per_step)
        per_epoch = per_data_epoch * self._stage.objective.steps_per_batch
        total = per_epoch * self._stage.optimisation.epochs
        progress = own.progress if own is not None else Progress(0, per_epoch, total)
        if (progress.steps_per_epoch, progress.total_steps) != (per_epoch, total):
            raise ValueError(
                f"{self._folder} was started with {progress.total_steps} steps, {progress.steps_per_epoch} per epoch; "
                f"the recipe now gives {total} and {per_epoch}; use a new --name"
            )
        return replace(progress, level=max(progress.level, self._level))

    def run(self) -> None:
        """Run the remaining steps; every rank ends at the same one. Collective.

        Errors: StopRequested, after writing a checkpoint; NonFinite; CatastrophicOverfitting.
        """
        context, stage, recipe = self._context, self._stage, self._context.recipe
        progress, replays = self._progress, stage.objective.steps_per_batch
        if context.group.is_first:
            plan = {**stage.describe(progress.steps_per_epoch), "batch_per_step": recipe.batch.batch_per_step}
            atomic_write_json(StageFolder(self._folder).plan, plan)
        log.info("%s: starting at step %d of %d", stage.name, progress.step, progress.total_steps)
        loader = context.loader(recipe.data.train_file)
        train_ids, held_out_ids = context.training_samples(loader)
        first, end = progress.step // replays, progress.total_steps // replays
        batches = micro_batches(context, stage, loader, train_ids, first, end)
        self._resources.callback(batches.close)
        per_step = context.local_micro_batches
        objective = build_objective(stage.objective, recipe.threat_model, stage.section, progress.level)
        if stage.is_sharpness_aware:
            assert self._state.network.scores is not None
            objective = sharpness_aware(objective, self._state.network.scores)
        training = Training(
            stage=stage,
            context=context,
            state=self._state,
            objective=objective,
            micro_batches=replayed(batches, per_step, replays, progress.step) if replays > 1 else batches,
            rows=self._tracker,
            validate=build_validation(context, stage, self._network, self._state.ema, loader, held_out_ids),
            save=self._save,
        )
        try:
            progress = self._progress = train(training, progress)
        except CatastrophicOverfitting:
            self._writer.wait()  # checkpoints still being written are removed next
            raise
        self._writer.wait()
        if not progress.finished:
            raise StopRequested(f"{stage.name} stopped on request, with a checkpoint of step {progress.step}")

    def _save(self, snapshot: Snapshot) -> None:
        if self._tracker is not None:
            check_token(self._folder, self._context.token)  # so that no file of a successor is touched
            self._tracker.sync()  # a checkpoint guarantees that the rows up to its step are on disk
            self._writer.submit(snapshot)

    def _guard(self, step: int) -> None:
        self._context.observe("before_manifest", {"stage": self._stage.name, "step": step})
        check_token(self._folder, self._context.token)

    def finish(self) -> None:
        """Write model.safetensors, then result.json, which marks the stage as finished. Rank 0 writes. Collective."""
        context, stage, folder, progress = self._context, self._stage, self._folder, self._progress
        network, scores, ema = self._network, self._state.network.scores, self._state.ema
        selected = progress.best_step or progress.step
        if selected != progress.step:
            snapshot = checkpoint.read_checkpoint(checkpoint.folder_of(folder, selected))
            model = overlaid(snapshot.model, snapshot.train_state)
        else:
            model = overlaid(self._state.network.state(), ema.state() if ema is not None else {})
        if scores is not None:
            scores.keep_budget()
        load_state(network, model, scores)
        if context.group.is_first:
            write_result(context, stage, network, scores, progress, selected)
        context.group.barrier()

    def close(self) -> None:
        """Stop reading batches, and detach the engine from the network."""
        self._resources.close()
