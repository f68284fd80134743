"""Trials of a method: their accuracy on the held-out images, and the choice of the best. The test set has no part."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from pathlib import Path

from pipeline.recipe.stages import Stage
from pipeline.run import checkpoint
from pipeline.run.checkpoint import CheckpointDamaged
from pipeline.run.files import atomic_write_json, make_folder, read_json, replacing, sha256_of
from pipeline.run.layout import StageFolder
from pipeline.run.lease import check_token
from pipeline.run.records import StageResult, TrialResult, read_metric_rows
from pipeline.training.context import RunContext

log = logging.getLogger(__name__)


def held_out_robust_accuracy(folder: Path, step: int) -> float:
    """Robust accuracy of a stage on the held-out images, from its metrics row of `step`.

    Errors: ValueError if there is no such row.
    """
    path = StageFolder(folder).metrics
    for row in reversed(read_metric_rows(path)):
        if row.kind == "validation" and row.step == step and row.robust_accuracy is not None:
            return row.robust_accuracy
    raise ValueError(
        f"{path} has no accuracy on the held-out images at step {step}, which decides between trials; delete {folder} "
        "and resume the run to train this trial again"
    )


def best_trial(accuracies: Sequence[float]) -> int:
    """Index of the highest accuracy, the first of equal ones."""
    return max(range(len(accuracies)), key=accuracies.__getitem__)


def choose_trial(context: RunContext, stage: Stage) -> None:
    """Write the files of a stage that chooses: those of its best trial, result.json last. Rank 0 writes. Collective.

    All trials are finished. After a crash, all is written again. Errors: ValueError naming a damaged file of a trial.
    """
    if context.group.is_first:
        _write_choice(context, stage)
    context.group.barrier()


def _write_choice(context: RunContext, stage: Stage) -> None:
    folder, token = context.folder(stage), context.token
    paths = [StageFolder(context.run_folder / trial.stage).result for trial in stage.trials]
    accuracies = [_accuracy(path) for path in paths]
    best = best_trial(accuracies)
    trial_folder = paths[best].parent
    result, source, target = StageResult.read(paths[best]), StageFolder(trial_folder), StageFolder(folder)
    make_folder(folder)
    check_token(folder, token)  # never replace what another process owns
    if sha256_of(source.network) != result.model_sha256:
        raise ValueError(
            f"{source.network} is not the network that the trial exported (its sha256 differs from result.json); "
            f"restore it, or delete {source.result} and resume the run"
        )
    try:
        snapshot = checkpoint.read_checkpoint(checkpoint.folder_of(trial_folder, result.selected_step or 0))
    except CheckpointDamaged as error:
        raise ValueError(
            f"{error}; restore it, or delete {trial_folder} and resume the run to train this trial again"
        ) from None
    checkpoint.delete_checkpoints_after(folder, 0)  # of a start that was killed
    checkpoint.write_checkpoint(folder, snapshot, lambda: check_token(folder, token))
    for original, copy in ((source.network, target.network), (source.metrics, target.metrics)):
        with replacing(copy) as temporary:
            shutil.copyfile(original, temporary)
    own = {"stage": stage.name}
    atomic_write_json(target.plan, read_json(source.plan) | own | {"trials": len(stage.trials)})
    tuned = [
        TrialResult(
            stage=trial.stage,
            finetune_lr=trial.finetune_lr,
            prune_lr=trial.prune_lr,
            held_out_robust_accuracy=accuracy,
            chosen=index == best,
        )
        for index, (trial, accuracy) in enumerate(zip(stage.trials, accuracies, strict=True))
    ]
    log.info("%s: chosen of %d trials: %s", stage.name, len(tuned), tuned[best].text)
    facts = {key: value for key, value in read_json(source.result).items() if key != "held_out_robust_accuracy"}
    check_token(folder, token)
    atomic_write_json(target.result, facts | own | {"tuned": [trial.to_json() for trial in tuned]})


def _accuracy(result: Path) -> float:
    accuracy = StageResult.read(result).held_out_robust_accuracy
    if accuracy is None:
        raise ValueError(f"{result} is damaged: held_out_robust_accuracy is missing; {StageResult.FIX}")
    return accuracy
