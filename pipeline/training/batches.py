"""A stage's stream of micro-batches: sample order, crops, image size per step; replayed batches, and noise they carry.

Free adversarial training takes every batch several times, and its noise is state. The noise belongs to places in the
step, not to images: place p of global micro-batch n has the noise that the last step left there, whatever image that
was for. A checkpoint holds it for all micro-batches of a step in their order, so that any legal number of workers
continues from it.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from itertools import islice

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.data.loading import sampling
from pipeline.data.loading.loader import Batch, Loader
from pipeline.recipe.schedules import image_size_at
from pipeline.recipe.stages import Stage
from pipeline.training.context import RunContext

NOISE = "noise/perturbation"


def micro_batches(
    context: RunContext, stage: Stage, loader: Loader, train_ids: NDArray[np.int64], start: int, stop: int
) -> Generator[Batch]:
    """This worker's micro-batches of the stage's steps start..stop-1; its first epochs follow those of earlier stages.

    Errors: those of `order.training_crops` and `order.training_plan`, at the call; those of the loader.
    """
    recipe = context.recipe
    per_epoch = sampling.steps_per_epoch(len(train_ids), recipe.batch.batch_per_step, recipe.extra_per_step)
    crops = sampling.training_crops(
        recipe.data.augmentation, loader.heights, loader.widths, recipe.data.image_size, recipe.seed
    )
    offset = stage.first_epoch * per_epoch
    plan = sampling.training_plan(
        train_ids,
        crops,
        seed=recipe.seed,
        start_step=offset + start,
        stop_step=offset + stop,
        batch_per_step=recipe.batch.batch_per_step,
        micro_batch=recipe.batch.micro_batch,
        rank=context.group.rank,
        world=context.group.world,
        extra_ids=np.arange(loader.num_samples, loader.num_samples + loader.num_extra),
        extra_per_step=recipe.extra_per_step,
    )

    def sizes() -> Iterator[int]:
        for step in range(start, stop):
            size = image_size_at(stage.optimisation, recipe.data.image_size, step // per_epoch)
            yield from [size] * context.local_micro_batches

    return loader.batches(plan, sizes())


def replayed(micro_batches: Iterator[Batch], per_step: int, times: int, start: int) -> Iterator[Batch]:
    """Micro-batches of the steps from `start` on, when each run of `per_step` of them makes `times` steps in a row.

    `micro_batches` begin with those of batch start // times. Each is taken once, when it is first needed, and kept
    until its batch's last step; as the loader's batches own their memory, nothing overwrites them meanwhile.
    """
    left = times - start % times
    for first in micro_batches:
        kept = [first]
        yield first
        for batch in islice(micro_batches, per_step - 1):
            kept.append(batch)
            yield batch
        for _ in range(left - 1):
            yield from kept
        left = times


class FreeNoise:
    """The perturbation of free training: zeros as a stage begins, written to by its objective."""

    prefix = "noise/"

    def __init__(self, context: RunContext) -> None:
        batch, size = context.recipe.batch, context.recipe.data.image_size
        self._group = context.group
        shape = (context.local_micro_batches, batch.micro_batch, 3, size, size)
        self._noise = torch.zeros(shape, device=self._group.device)

    def of(self, micro_batch: int) -> Tensor:
        """The live noise [micro_batch, 3, s, s] float32 of this worker's micro-batch of that number in the step."""
        return self._noise[micro_batch]

    def state(self) -> dict[str, Tensor]:
        """All ranks' noise as a checkpoint holds it: a CPU copy, global micro-batches in order. Collective.

        One micro-batch of each rank at a time, as on a device the whole may have no room.
        """
        rows = [self._group.gather_rows(one[None]).to("cpu", copy=True) for one in self._noise]
        return {NOISE: torch.stack(rows, dim=1).flatten(0, 1)}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take this rank's part of what `state` returned, on any number of workers that divides the micro-batches."""
        first = self._group.rank * len(self._noise)
        self._noise.copy_(tensors[NOISE][first : first + len(self._noise)])
