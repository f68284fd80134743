"""What a stage is fed: the size of its images goes by the epoch alone, from any step and on any number of workers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pipeline.data.loading.loader import Batch
from pipeline.distributed import Group
from pipeline.recipe.schema import Recipe
from pipeline.recipe.stages import stages_of
from pipeline.run.lease import Leases
from pipeline.training.batches import micro_batches
from pipeline.training.context import RunContext
from pipeline.training.stage import run_stages
from tests.support.small_recipe import small_recipe

CPU = torch.device("cpu")
SIZES = [32, 32, 64, 64, 96, 96, 128, 128]
"""Of the eight steps of each phase: two an epoch, and four epochs."""


def growing(data: Path, **sections: object) -> Recipe:
    resolution = {"smallest": 32, "full_from": 3}
    phase = {"epochs": 4, "lr": 0.1, "resolution": resolution}
    values = {
        "phases": {"pretrain": phase, "prune": phase, "finetune": phase},
        "data": {"image_size": 128, "augmentation": "random_resized_crop", "train_images": 16},
        "batch": {"batch_per_step": 8, "micro_batch": 2},
    }
    return small_recipe(data, **(values | sections))


def fed(recipe: Recipe, stage_number: int, start: int, stop: int, rank: int = 0, world: int = 1) -> list[Batch]:
    context = RunContext(recipe, Path(), "token", Group(rank, world, CPU))
    try:
        loader = context.loader(recipe.data.train_file)
        train_ids, _ = context.training_samples(loader)
        return list(micro_batches(context, stages_of(recipe)[stage_number], loader, train_ids, start, stop))
    finally:
        context.close()


def same(some: list[Batch], others: list[Batch]) -> bool:
    return len(some) == len(others) and all(
        torch.equal(one.images, other.images) and torch.equal(one.ids, other.ids)
        for one, other in zip(some, others, strict=True)
    )


@pytest.mark.parametrize("stage_number", [0, 1])
def test_a_stage_resumed_within_its_ramp_gets_the_same_batches(fashion_data: Path, stage_number: int) -> None:
    recipe = growing(fashion_data)
    straight = fed(recipe, stage_number, 0, 8)
    assert [batch.images.shape[2:] for batch in straight[::4]] == [(size, size) for size in SIZES]
    for start in (1, 3, 4, 7):
        assert same(fed(recipe, stage_number, start, 8), straight[4 * start :])
    assert not same(fed(recipe, 1 - stage_number, 0, 8), straight)


def test_two_workers_are_fed_what_one_is(fashion_data: Path) -> None:
    recipe = growing(fashion_data)
    first, second = (fed(recipe, 0, 3, 8, rank, 2) for rank in (0, 1))
    merged = [batch for step in range(5) for half in (first, second) for batch in half[2 * step : 2 * step + 2]]
    assert same(merged, fed(recipe, 0, 3, 8))


def test_images_that_are_too_small_for_the_network_are_refused_by_their_key(fashion_data: Path, tmp_path: Path) -> None:
    recipe = growing(fashion_data, model={"arch": "alexnet", "num_classes": 10})
    stages = stages_of(recipe)
    leases = Leases([tmp_path / stage.name for stage in stages])
    words = (
        r"^model.arch alexnet cannot take images of phases.pretrain.resolution.smallest 32 \(.*; change one of them$"
    )
    try:
        with pytest.raises(ValueError, match=words):
            run_stages(RunContext(recipe, tmp_path, leases.token, Group(0, 1, CPU)), stages)
    finally:
        leases.release()
