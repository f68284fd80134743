"""Rolls a stage back after catastrophic overfitting, to continue with a stronger attack.

Only the level is recorded, in later checkpoints. A run that ends before the first of them resumes from the same good
checkpoint, overfits in the same way, and rolls back again.
"""

from __future__ import annotations

import logging

from pipeline.recipe.stages import Stage
from pipeline.recipe.technique import OneStep
from pipeline.robustness.overfitting import STRONGEST, CatastrophicOverfitting, StillOverfitting, stronger
from pipeline.run import checkpoint
from pipeline.run.checkpoint import Snapshot
from pipeline.run.lease import check_token
from pipeline.run.tracking.metrics import Tracker
from pipeline.training.context import RunContext

log = logging.getLogger(__name__)


def roll_back(
    context: RunContext, stage: Stage, overfitting: CatastrophicOverfitting, tracker: Tracker | None
) -> tuple[Snapshot | None, int]:
    """Remove checkpoints and metric rows beyond the last good epoch end; rank 0 (with the tracker) removes them.

    Returns (the checkpoint to continue from, on rank 0, None for the stage's start; the level to continue with). If the
    good checkpoint is damaged, an older one is used. Errors: StillOverfitting.
    """
    level, folder = overfitting.level + 1, context.folder(stage)
    if level > STRONGEST:
        raise StillOverfitting(
            f"{overfitting}, although training was with PGD of {2**STRONGEST} steps; lower objective.overfitting_guard "
            f"{stage.objective.smallest_ratio} if such a ratio is to be expected, or eps or the learning rate, in a "
            "new run"
        )
    own = None
    if tracker is not None:
        check_token(folder, context.token)  # never remove what another process owns
        checkpoint.delete_checkpoints_after(folder, overfitting.good_step or 0)
        own = checkpoint.read_newest_checkpoint(folder)
        step = own.progress.step if own is not None else 0
        checkpoint.delete_checkpoints_after(folder, step)
        objective, threat_model = stage.objective, context.recipe.threat_model
        assert isinstance(objective, OneStep), objective.name
        assert threat_model is not None, objective.name
        steps, size = stronger(level, float(threat_model.eps), float(objective.step_size))
        message = f"{overfitting}; continuing from step {step} with PGD of {steps} steps of {size:.4g} (level {level})"
        log.warning("%s", message)
        tracker.alert("Catastrophic overfitting", f"{context.run_folder.name}: {message}", "WARN")
        tracker.truncate(step)
    context.observe("rolled_back", {"stage": stage.name, "step": overfitting.step, "level": level})
    return own, level
