"""Going back from catastrophic overfitting, to go on with a stronger attack.

Nothing of it is recorded but the level, in the checkpoints that are written from then on. A run that ends before the
first of them goes on from the same good checkpoint, overfits in the same way, and goes back again.
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


def go_back(
    context: RunContext, stage: Stage, found: CatastrophicOverfitting, tracker: Tracker | None
) -> tuple[Snapshot | None, int]:
    """Remove checkpoints and metric rows beyond the last epoch end that was good; rank 0 (with the tracker) does it.

    Returns (on rank 0 the checkpoint to go on from, None for the stage's beginning; level to go on with). A good
    checkpoint that is damaged is passed over for one before it. Errors: StillOverfitting.
    """
    level, folder = found.level + 1, context.folder(stage)
    if level > STRONGEST:
        raise StillOverfitting(
            f"{found}, although training was with PGD of {2**STRONGEST} steps; lower objective.overfitting_guard "
            f"{stage.objective.smallest_ratio} if such a ratio is to be expected, or eps or the learning rate, in a "
            "new run"
        )
    own = None
    if tracker is not None:
        check_token(folder, context.token)  # what is removed must be ours
        checkpoint.delete_checkpoints_after(folder, found.good_step or 0)
        own = checkpoint.read_newest_checkpoint(folder)
        step = own.progress.step if own is not None else 0
        checkpoint.delete_checkpoints_after(folder, step)
        objective, threat_model = stage.objective, context.recipe.threat_model
        assert isinstance(objective, OneStep), objective.name
        assert threat_model is not None, objective.name
        steps, size = stronger(level, float(threat_model.eps), float(objective.step_size))
        said = f"{found}; going on from step {step} with PGD of {steps} steps of {size:.4g} (level {level})"
        log.warning("%s", said)
        tracker.alert("Catastrophic overfitting", f"{context.run_folder.name}: {said}", "WARN")
        tracker.truncate(step)
    context.observe("rolled_back", {"stage": stage.name, "step": found.step, "level": level})
    return own, level
