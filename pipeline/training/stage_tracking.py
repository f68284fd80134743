"""A stage as wandb sees it: what it is made of, what it began with and left, how it ended."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.evaluation.result import KINDS, EvaluationResult
from pipeline.recipe.stages import NETWORK_OF_PHASE, Stage, stages_of
from pipeline.run.files import read_json
from pipeline.run.layout import StageFolder, is_done, unevaluated
from pipeline.run.provenance import config_of
from pipeline.run.stop import StopRequested
from pipeline.run.tracking.metrics import Tracker
from pipeline.training.context import RunContext
from pipeline.training.hardware import hardware_of
from pipeline.training.loop import NonFinite

GROUPED_BY = ("method", "phase", "keep_fraction", "sparsity")
"""Facts that stand beside a stage's accuracies in wandb's table of runs."""


@contextmanager
def stage_tracker(context: RunContext, stage: Stage) -> Iterator[Tracker | None]:
    """The stage's Tracker on rank 0, and None on the others. Collective.

    However the stage ends, people who have wandb's alerts on are told, if its process lives to do so.
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
        if stage.starts_from is not None:
            tracker.uses(artifact_of(run, stage.starts_from))
        try:
            yield tracker
        except StopRequested as stopped:
            tracker.alert("Run stopped", f"{run.name}: {stopped}", "WARN")
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


def tell_kept(context: RunContext, stage: Stage, tracker: Tracker | None) -> None:
    """Give wandb the network of a stage that is trained, and the evaluations that are kept already.

    Each start says it again, whichever of them did the work: it may have been offline then, or was killed. A network is
    uploaded once, and while the test set is looked at.
    """
    if tracker is None:
        return
    folder = context.folder(stage)
    result = read_json(StageFolder(folder).result)
    metadata = facts_of(stage) | {key: result[key] for key in ("steps", "model_sha256", "mask_sha256")}
    files = [StageFolder(folder).network, StageFolder(folder).result]
    tracker.produces(artifact_of(context.run_folder, stage.name), files, metadata)
    left = unevaluated(context.run_folder, stage)
    for label in (label for label in stage.evaluations if label not in left):
        tracker.summary(summary_of(stage, label, EvaluationResult.read(StageFolder(folder).evaluation(label))))


def facts_of(stage: Stage) -> dict[str, Any]:
    """What networks are grouped and drawn by."""
    keep = 1.0 if stage.keep_fraction is None else float(stage.keep_fraction)
    sparsity = 0.0 if stage.keep_fraction is None else float(1 - stage.keep_fraction)
    facts = {"name": stage.name, "phase": stage.phase, "method": NETWORK_OF_PHASE[stage.phase]}
    return facts | {"keep_fraction": keep, "sparsity": sparsity, "parent": stage.starts_from}


def summary_of(stage: Stage, label: str, evaluation: EvaluationResult) -> dict[str, Any]:
    """One of `stage.evaluations` for wandb's table of runs: as test_<label>. The stage's own measure is called test,
    and is there once more as clean_accuracy and robust_accuracy, with their intervals."""
    if label != stage.evaluations[0]:
        return {f"test_{label}": evaluation.to_json()}
    headline = {}
    for kind in KINDS:
        accuracy = evaluation.accuracy(kind)
        interval = {"low": accuracy.low, "high": accuracy.high}
        headline |= {f"{kind}_accuracy": accuracy.value, f"{kind}_interval": interval}
    return {"test": evaluation.to_json()} | headline


def artifact_of(run: Path, stage: str) -> str:
    """What the network of a stage is called among wandb's artifacts."""
    return f"{run.name}-{stage.replace('/', '-')}"
