"""Everything around the loop: where a stage starts, what it reads, what it leaves.

Runs inside any process group: Ray's (`pipeline.training.worker`) or one that a test or a benchmark makes.
"""

from __future__ import annotations

import logging
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from pipeline.data.loading import sampling
from pipeline.models import Network, build_network, check_size
from pipeline.models.ema import overlaid, start_average
from pipeline.models.export import write_model
from pipeline.models.import_weights import load_foreign
from pipeline.models.pruning.mask_drift import Drift
from pipeline.models.pruning.score_init import FirstScore, first_scores, zero
from pipeline.models.pruning.scores import (
    attach_scores,
    effective_state,
    layer_counts,
    load_state,
    mask_sha256,
    named_state,
    refresh_masks,
    train_only,
    trained_parameters,
)
from pipeline.recipe.file import recipe_hash
from pipeline.recipe.stages import Stage
from pipeline.robustness.objectives import build_objective
from pipeline.robustness.overfitting import CatastrophicOverfitting
from pipeline.run import checkpoint
from pipeline.run.checkpoint import Snapshot, Writer
from pipeline.run.files import atomic_write_json, read_json, sha256_of
from pipeline.run.layout import unevaluated
from pipeline.run.lease import check_token
from pipeline.run.progress import Progress
from pipeline.run.stop import StopRequested
from pipeline.run.tracking.metrics import Tracker, cut_rows
from pipeline.training.batches import micro_batches
from pipeline.training.context import Job
from pipeline.training.engine import Engine, autocast_of
from pipeline.training.health import check_worker
from pipeline.training.loop import Training, train
from pipeline.training.replays import own_noise, replayed, start_noise
from pipeline.training.rollback import go_back
from pipeline.training.snip import connection_sensitivity
from pipeline.training.stage_evaluation import build_validation, check_honesty, evaluate_stage
from pipeline.training.stage_tracking import stage_tracker, summary_of, tell_kept

log = logging.getLogger(__name__)


def run_stages(job: Job, stages: list[Stage]) -> None:
    """Walk through the stages; what is finished is not repeated. Collective.

    Errors: StopRequested once the run was asked to stop and has its checkpoint; Unhealthy.
    """
    try:
        check_worker(job)
        for stage in stages:
            _run_stage(job, stage)
    finally:
        job.close()


def _run_stage(job: Job, stage: Stage) -> None:
    folder = job.folder(stage)
    to_train = job.group.broadcast(not (folder / "result.json").exists())
    to_evaluate = job.group.broadcast(unevaluated(job.run_folder, stage))
    if not to_train and not to_evaluate:
        return
    folder.mkdir(parents=True, exist_ok=True)
    own = _own_checkpoint(folder, job.token) if to_train and job.group.is_first else None
    # Only now, as the rows beyond the checkpoint were cut: one wandb run for training and test.
    with stage_tracker(job, stage) as tracker:
        if to_train:
            _train_stage(job, stage, own, tracker)
            job.observe("stage_finished", {"stage": stage.name})
        tell_kept(job, stage, tracker)
        if to_evaluate:
            check_honesty(job, stage)
            for label, result in evaluate_stage(job, stage, to_evaluate):
                if tracker is not None:
                    tracker.summary(summary_of(stage, label, result))


def _own_checkpoint(folder: Path, token: str) -> Snapshot | None:
    """The stage's own newest whole checkpoint; what lies beyond it is removed.

    Errors: LeaseHeld if the stage is another's by now; ValueError if it has checkpoints, and none of them is whole.
    """
    check_token(folder, token)  # what is removed must be ours
    own = checkpoint.read_newest_checkpoint(folder)
    if own is None and (lost := checkpoint.committed_steps(folder)):
        raise ValueError(
            f"{folder}: none of its checkpoints is whole (steps {', '.join(map(str, lost))}; logs/worker-0.log says "
            "what is wrong with each); bring one back, or delete its step-* folders to begin it anew, then resume"
        )
    checkpoint.delete_checkpoints_after(folder, own.progress.step if own else 0)
    cut_rows(folder / "metrics.jsonl", own.progress.step if own else 0)
    return own


def _starting_point(job: Job, stage: Stage, network: Network, own: Snapshot | None) -> tuple[Snapshot | None, int]:
    """Load the weights a stage begins with; returns (its own checkpoint or None, step to continue from).

    1. The stage's own newest whole checkpoint, which rank 0 has read.
    2. The selected checkpoint of the stage it starts from.
    3. The foreign weights that the recipe names.
    4. Fresh initialisation from the seed.
    """
    step = job.group.broadcast(own.progress.step if own else 0)
    if step:
        own = own or checkpoint.read_checkpoint(checkpoint.folder_of(job.folder(stage), step))
        if stage.keep_fraction is not None:
            attach_scores(network, stage.keep_fraction, job.recipe.sparsity.allocation, zero)
        load_state(network, own.model)
    elif stage.starts_from is not None:
        source = job.run_folder / stage.starts_from
        selected = read_json(source / "result.json")["selected_step"]
        snapshot = checkpoint.read_checkpoint(checkpoint.folder_of(source, selected))
        tensors = overlaid(snapshot.model, snapshot.carried)
        assert stage.keep_fraction is not None
        if stage.scores_from == "source":
            attach_scores(network, stage.keep_fraction, job.recipe.sparsity.allocation, zero)
            load_state(network, tensors)
        else:
            load_state(network, tensors)
            first = _first_scores(job, stage, network)
            attach_scores(network, stage.keep_fraction, job.recipe.sparsity.allocation, first)
    elif job.recipe.model.weights is not None:
        load_foreign(network, Path(job.recipe.model.weights), job.recipe.model)
    return own, step


def _first_scores(job: Job, stage: Stage, network: Network) -> FirstScore:
    """Where a stage's own scores begin; a checkpoint of it has them. SNIP looks at the images of the first step."""
    recipe, group = job.recipe, job.group
    if stage.scores_from != "snip":
        return first_scores(stage.scores_from, recipe.seed)
    loader = job.loader(recipe.data.train_file)
    train_ids, _ = job.training_samples(loader)
    objective = build_objective(stage.objective, recipe.threat_model, stage.phase)
    with closing(micro_batches(job, stage, loader, train_ids, 0, 1)) as batches:
        dense, autocast = network.to(group.device), autocast_of(recipe, group.device)
        found = connection_sensitivity(dense, batches, objective, autocast, group, seed=recipe.seed, stage=stage.name)
    return lambda name, weight: found[name]


def _train_stage(job: Job, stage: Stage, own: Snapshot | None, tracker: Tracker | None) -> None:
    """Train to the end; where training overfits to its attack, again from before that, with a stronger one."""
    level = 0
    while True:
        try:
            return _attempt(job, stage, own, level, tracker)
        except CatastrophicOverfitting as found:
            own, level = go_back(job, stage, found, tracker)


def _attempt(job: Job, stage: Stage, own: Snapshot | None, level: int, tracker: Tracker | None) -> None:
    recipe, group, folder = job.recipe, job.group, job.folder(stage)
    network = build_network(recipe.model, recipe.seed, recipe.data.image_size)
    for key, growth in recipe.growing.items():
        check_size(network.backbone, recipe.model.arch, growth.smallest, f"{key}.smallest")
    own, start = _starting_point(job, stage, network, own)
    drift = None
    if group.is_first and stage.trains == "scores":
        first = first_scores(stage.scores_from, recipe.seed)
        drift = Drift.begin(network, first, own.carried if own is not None else None, group.device)
    network.to(group.device).train()
    train_only(network, stage.trains, recipe.sparsity.batchnorm)
    refresh_masks(network)
    engine = Engine(network, trained_parameters(network), stage.optimisation, recipe, group)
    average = start_average(network) if stage.optimisation.ema_decay is not None else {}
    noise = start_noise(recipe, group) if stage.objective.name == "free" else None
    if own is not None:
        engine.load_optimizer_state(own.optimizer)
        average = {name: own.carried[name].to(group.device) for name in average}
        noise = None if noise is None else own_noise(own.carried, group)

    loader = job.loader(recipe.data.train_file)
    train_ids, validation_ids = job.training_samples(loader)
    replays = stage.objective.steps_per_batch
    per_epoch = sampling.steps_per_epoch(len(train_ids), recipe.batch.batch_per_step, recipe.extra_per_step) * replays
    total = per_epoch * stage.optimisation.epochs
    progress = own.progress if own is not None else Progress(0, per_epoch, total)
    if (progress.steps_per_epoch, progress.total_steps) != (per_epoch, total):
        raise ValueError(
            f"{folder} was begun with {progress.total_steps} steps of which {progress.steps_per_epoch} make an epoch; "
            f"the recipe now says {total} and {per_epoch}; use a new --name"
        )
    progress = replace(progress, level=max(progress.level, level))
    if group.is_first:
        describe = {**stage.describe(per_epoch), "batch_per_step": recipe.batch.batch_per_step}
        atomic_write_json(folder / "stage.json", describe)
    log.info("%s: starting at step %d of %d", stage.name, start, total)

    def guard(step: int) -> None:
        job.observe("before_manifest", {"stage": stage.name, "step": step})
        check_token(folder, job.token)

    writer = Writer(folder, recipe.checkpoint.keep, guard)

    def save(snapshot: Snapshot) -> None:
        if tracker is not None:
            check_token(folder, job.token)  # before anything of a successor's could be touched
            tracker.sync()  # rows first: a checkpoint promises that those up to its step are on disk
            writer.submit(snapshot)

    batches = micro_batches(job, stage, loader, train_ids, start // replays, total // replays)
    local = recipe.batch.micro_batches_per_step // group.world
    training = Training(
        stage=stage,
        recipe=recipe,
        group=group,
        network=network,
        engine=engine,
        objective=build_objective(stage.objective, recipe.threat_model, stage.phase, progress.level),
        micro_batches=replayed(batches, local, replays, start) if replays > 1 else batches,
        rows=tracker,
        average=average,
        noise=noise,
        drift=drift,
        validate=build_validation(job, stage, network, average, loader, validation_ids),
        save=save,
        observe=job.observe,
        stop_requested=job.stop_requested,
    )
    with ExitStack() as stack:
        stack.callback(engine.close)
        stack.callback(batches.close)
        try:
            progress = train(training, progress)
        except CatastrophicOverfitting:
            writer.wait()  # who goes back deletes what this would still write
            raise
        writer.wait()
        if not progress.finished:
            raise StopRequested(f"{stage.name} was asked to stop, and has a checkpoint of step {progress.step}")
        _finish(job, stage, network, average, progress)


def _finish(job: Job, stage: Stage, network: Network, average: dict[str, Tensor], progress: Progress) -> None:
    """Write model.safetensors, then result.json: the stage is finished when that exists. Rank 0 writes."""
    folder, selected = job.folder(stage), progress.best_step or progress.step
    model: dict[str, Tensor] = named_state(network)
    if selected != progress.step:
        snapshot = checkpoint.read_checkpoint(checkpoint.folder_of(folder, selected))
        model, average = snapshot.model, snapshot.carried
    load_state(network, overlaid(model, average))
    if job.group.is_first:
        keep = stage.describe(progress.steps_per_epoch)["keep_fraction"]
        facts = {"keep_fraction": keep, "mask_sha256": mask_sha256(network), "recipe_sha256": recipe_hash(job.recipe)}
        facts["image_size"] = job.recipe.data.image_size
        write_model(folder / "model.safetensors", effective_state(network), job.recipe.model, facts)
        check_token(folder, job.token)
        result = {
            "stage": stage.name,
            "phase": stage.phase,
            "keep_fraction": keep,
            "steps": progress.step,
            "selected_step": selected,
            "model_sha256": sha256_of(folder / "model.safetensors"),
            "mask_sha256": facts["mask_sha256"],
            "layers": layer_counts(network),
        }
        atomic_write_json(folder / "result.json", result)
    job.group.barrier()
