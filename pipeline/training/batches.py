"""A stage's stream of micro-batches: sample order, crops, image size per step; and the replays and noise of `free`.

Free adversarial training replays every batch, and its noise is state. The noise belongs to positions in the step, not
to images: position p of global micro-batch n starts from the noise that the last step left there, for any image. A
checkpoint holds it for all micro-batches of a step in order, so a run can resume on any legal number of workers.
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
from pipeline.recipe.schema import Recipe
from pipeline.recipe.stages import Stage
from pipeline.training.context import RunContext

NOISE = "noise/perturbation"


def crop_function(recipe: Recipe, loader: Loader) -> sampling.CropFunction:
    """The crops of training images, by id and epoch of the run. Errors: those of `sampling.training_crops`."""
    data = recipe.data
    return sampling.training_crops(data.augmentation, loader.heights, loader.widths, data.image_size, recipe.seed)


def micro_batches(
    context: RunContext, stage: Stage, loader: Loader, train_ids: NDArray[np.int64], start: int, stop: int
) -> Generator[Batch]:
    """This worker's micro-batches of the stage's steps start..stop-1; epochs count on from those of earlier stages.

    Errors: those of `sampling.training_crops` and `sampling.training_plan`, at the call; those of the loader.
    """
    recipe = context.recipe
    per_epoch = sampling.steps_per_epoch(len(train_ids), recipe.batch.batch_per_step, recipe.extra_per_step)
    offset = stage.first_epoch * per_epoch
    plan = sampling.training_plan(
        train_ids,
        crop_function(recipe, loader),
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
    """Micro-batches of the steps from `start` on, where each batch of `per_step` micro-batches makes `times` steps.

    `micro_batches` start with those of batch start // times. Each is drawn when first needed and kept until the last
    step of its batch; the loader's batches own their memory, so nothing overwrites them meanwhile.
    """
    remaining = times - start % times
    for first in micro_batches:
        batches = [first]
        yield first
        for batch in islice(micro_batches, per_step - 1):
            batches.append(batch)
            yield batch
        for _ in range(remaining - 1):
            yield from batches
        remaining = times


class FreeNoise:
    """The perturbation of free training: zeros at the start of a stage, updated in place by its objective."""

    prefix = "noise/"

    def __init__(self, context: RunContext) -> None:
        batch, size = context.recipe.batch, context.recipe.data.image_size
        self._group = context.group
        shape = (context.local_micro_batches, batch.micro_batch, 3, size, size)
        self._noise = torch.zeros(shape, device=self._group.device)

    def of(self, micro_batch: int, *_: object) -> Tensor:
        """The noise [micro_batch, 3, s, s], float32, of this worker's micro-batch of this index; not a copy."""
        return self._noise[micro_batch]

    def state(self) -> dict[str, Tensor]:
        """All ranks' noise for a checkpoint: a CPU copy, global micro-batches in order. Collective.

        One micro-batch of each rank at a time, as the whole may not fit on the device.
        """
        rows = [self._group.gather_rows(one[None]).to("cpu", copy=True) for one in self._noise]
        return {NOISE: torch.stack(rows, dim=1).flatten(0, 1)}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Load this rank's part of what `state` returned, on any number of workers that divides the micro-batches."""
        first = self._group.rank * len(self._noise)
        self._noise.copy_(tensors[NOISE][first : first + len(self._noise)])
