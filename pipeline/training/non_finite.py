"""The error that stops training when a value is not finite: what it names, and its advice."""

from __future__ import annotations

import math

from torch import Tensor

from pipeline.distributed import Group
from pipeline.recipe.stages import Stage


class NonFinite(RuntimeError):
    """A loss, gradient, weight, score or momentum is NaN or infinite; raised on all ranks, and never checkpointed."""


def non_finite_loss(stage: Stage, group: Group, step: int, losses: list[tuple[Tensor, Tensor]]) -> NonFinite:
    """The error for the losses of a step, which names the samples of all micro-batches with a non-finite one.

    `losses`: sample ids and loss of this worker's micro-batches. Collective: the same message on every rank.
    """
    local = [f"{float(loss)} for samples {ids.tolist()}" for ids, loss in losses if not math.isfinite(float(loss))]
    where = "; ".join(part for parts in group.gather(local) for part in parts)
    return NonFinite(f"{stage.name}: the loss of step {step} is not finite: {where}; {advice(stage)}")


def advice(stage: Stage) -> str:
    return f"lower phases.{stage.section}.lr or lengthen its warm-up"
