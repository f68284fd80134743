"""What a stage is fed: its images, in their order, with their crops and sizes."""

from __future__ import annotations

from collections.abc import Generator, Iterator

import numpy as np
from numpy.typing import NDArray

from pipeline.data.loading import sampling
from pipeline.data.loading.loader import Batch, Loader
from pipeline.recipe.schedules import image_size_at
from pipeline.recipe.stages import Stage
from pipeline.training.context import Job


def micro_batches(
    job: Job, stage: Stage, loader: Loader, train_ids: NDArray[np.int64], start: int, stop: int
) -> Generator[Batch]:
    """This worker's micro-batches of the stage's steps start..stop-1; its first epochs follow those of earlier stages.

    Errors: those of `order.training_crops` and `order.training_plan`, at the call; those of the loader.
    """
    recipe = job.recipe
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
        rank=job.group.rank,
        world=job.group.world,
        extra_ids=np.arange(loader.num_samples, loader.num_samples + loader.num_extra),
        extra_per_step=recipe.extra_per_step,
    )

    def sizes() -> Iterator[int]:
        for step in range(start, stop):
            size = image_size_at(stage.optimisation, recipe.data.image_size, step // per_epoch)
            yield from [size] * (recipe.batch.micro_batches_per_step // job.group.world)

    return loader.batches(plan, sizes())
