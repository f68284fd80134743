"""A stage in wandb: its config, input and output artifacts, results and alerts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pipeline.evaluation.result import KINDS, EvaluationResult
from pipeline.recipe.stages import Stage, stages_of
from pipeline.run.layout import StageFolder, is_done, unevaluated
from pipeline.run.provenance import config_of
from pipeline.run.records import StageResult
from pipeline.run.stop import StopRequested
from pipeline.run.tracking.metrics import Tracker
from pipeline.run.tracking.wandb_ids import artifact_of
from pipeline.training.context import RunContext
from pipeline.training.hardware import hardware_of
from pipeline.training.non_finite import NonFinite

GROUPED_BY = ("method", "phase", "keep_fraction", "sparsity")
"""Facts shown beside a stage's accuracies in wandb's table of runs."""


@contextmanager
def stage_tracker(context: RunContext, stage: Stage) -> Iterator[Tracker | None]:
    """The stage's Tracker on rank 0, and None on the others. Collective.

    Sends a wandb alert when the stage fails or is stopped, and when the run is done.
    """
    recipe, run = context.recipe, context.run_folder
    mirrored = recipe.tracking.wandb != "disabled"
    hardware = hardware_of(context.group, recipe.workers.threads) if mirrored else {}
    if not context.group.is_first:
        yield None
        return
    with Tracker(
        context.folder(stage),
        run_name=run.name,
        stage=stage.name,
        config={**config_of(recipe, run), "stage": facts_of(stage), "hardware": hardware},
        batch_per_step=recipe.batch.batch_per_step,
        log_every_steps=recipe.tracking.log_every_steps,
        wandb_mode=recipe.tracking.wandb,
        project=recipe.tracking.wandb_project,
    ) as tracker:
        for source in stage.sources:
            tracker.uses(artifact_of(run, source))
        try:
            yield tracker
        except StopRequested as stop:
            tracker.alert("Run stopped", f"{run.name}: {stop}", "WARN")
            raise
        except NonFinite as error:
            tracker.alert("Loss, gradient or weight is not finite", f"{run.name}: {error}", "ERROR")
            raise
        except Exception as error:
            tracker.alert("Stage failed", f"{run.name}: {stage.name}: {type(error).__name__}: {error}", "ERROR")
            raise
        tracker.summary({key: value for key, value in facts_of(stage).items() if key in GROUPED_BY})
        stages = stages_of(recipe)
        if all(is_done(run, each) for each in stages):
            tracker.alert("Run done", f"{run.name}: all {len(stages)} stages are done", "INFO")


def log_finished_parts(context: RunContext, stage: Stage, tracker: Tracker | None) -> None:
    """Log the network of a trained stage and its existing evaluations to wandb.

    Repeated at every start of the stage: the start that produced them may have been offline or killed. A network is
    uploaded once, while the evaluation on the test set runs.
    """
    if tracker is None:
        return
    folder = context.folder(stage)
    result = StageResult.read(StageFolder(folder).result)
    metadata = facts_of(stage) | result.model_dump(include={"steps", "model_sha256", "mask_sha256"})
    files = [StageFolder(folder).network, StageFolder(folder).result]
    if (trial := result.chosen) is not None:
        metadata["parent"] = trial.stage
        rates = trial.model_dump(include={"finetune_lr", "prune_lr", "held_out_robust_accuracy"}, exclude_none=True)
        tracker.summary({"tuned": {"trials": len(result.tuned), **rates}})
    tracker.produces(artifact_of(context.run_folder, stage.name), files, metadata)
    pending = unevaluated(context.run_folder, stage)
    for label in (label for label in stage.evaluations if label not in pending):
        tracker.summary(summary_of(stage, label, EvaluationResult.read(StageFolder(folder).evaluation(label))))


def facts_of(stage: Stage) -> dict[str, Any]:
    """Facts by which networks are grouped and plotted."""
    keep = 1.0 if stage.keep_fraction is None else float(stage.keep_fraction)
    sparsity = 0.0 if stage.keep_fraction is None else float(1 - stage.keep_fraction)
    facts = {"name": stage.name, "phase": stage.phase, "method": stage.title}
    return facts | {"keep_fraction": keep, "sparsity": sparsity, "parent": stage.starts_from}


def summary_of(stage: Stage, label: str, evaluation: EvaluationResult) -> dict[str, Any]:
    """One of `stage.evaluations` for wandb's table of runs, as test_<label>. The stage's own measure is `test`, and
    also gives clean_accuracy and robust_accuracy with their intervals."""
    if label != stage.evaluations[0]:
        return {f"test_{label}": evaluation.to_json()}
    headline = {}
    for kind in KINDS:
        accuracy = evaluation.accuracy(kind)
        interval = {"low": accuracy.low, "high": accuracy.high}
        headline |= {f"{kind}_accuracy": accuracy.value, f"{kind}_interval": interval}
    return {"test": evaluation.to_json()} | headline
