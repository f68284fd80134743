"""1, 2 and 4 workers: the same images, crops and attack noise at every step, and results that agree."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline import checkpoint
from pipeline.evaluate.statistics import wilson_interval
from pipeline.files import atomic_write_text, read_json
from pipeline.group import Group
from pipeline.job import Job
from pipeline.lease import Leases
from pipeline.phases import stages_of
from pipeline.recipe import Recipe
from pipeline.recipe_file import dump_recipe
from pipeline.stage import run_stages
from tests.dist.processes import run_group
from tests.small_recipe import small_recipe

Fed = dict[tuple[str, int, int], str]


def _run(group: Group, recipe: Recipe, folder: Path, token: str, stage_names: list[str]) -> Fed:
    """Run stages in one process; returns (stage, step, global micro-batch) -> hash of ids and of the images fed."""
    fed: Fed = {}
    local = recipe.batch.micro_batches_per_step // group.world

    def observe(event: str, facts: dict[str, Any]) -> None:
        if event == "forward":
            digest = hashlib.sha256(facts["ids"].numpy().tobytes())
            digest.update(facts["fed"].detach().contiguous().numpy().tobytes())
            fed[facts["stage"], facts["step"], group.rank * local + facts["micro_batch"]] = digest.hexdigest()

    stages = [stage for stage in stages_of(recipe) if stage.name in stage_names]
    run_stages(Job(recipe, folder, token, group, observe), stages)
    return fed


def _train(recipe: Recipe, folder: Path, world: int, stage_names: list[str]) -> Fed:
    folder.mkdir()
    atomic_write_text(folder / "recipe.yaml", dump_recipe(recipe))
    leases = Leases([folder / name for name in stage_names])
    try:
        parts = run_group(world, _run, recipe, folder, leases.token, stage_names)
    finally:
        leases.release()
    return {key: value for part in parts for key, value in part.items()}


PRETRAIN_TO_PRUNE = ["pretrain", "keep-0.1/prune"]


def test_every_world_size_feeds_the_same_tensors(fashion_data: Path, tmp_path: Path) -> None:
    """The network stands still (a learning rate that vanishes in float32), so that what differs can only come from the
    data, the crops, the noise and BatchNorm's statistics; all fed tensors must be equal, bit for bit, at every step."""
    still = {"epochs": 2, "lr": 1e-30, "weight_decay": 0.0}
    recipe = small_recipe(
        fashion_data,
        phases={"pretrain": still, "prune": still},
        data={"augmentation": "pad_crop_flip", "train_images": 320},
        evaluation={"validation_steps": 0},
    )
    fed = {world: _train(recipe, tmp_path / f"w{world}", world, PRETRAIN_TO_PRUNE) for world in (1, 2, 4)}
    assert len(fed[1]) == 2 * 2 * 5 * 4  # stages, epochs, steps, micro-batches
    assert len(set(fed[1].values())) == len(fed[1]), "two steps were fed the same tensor"
    assert fed[1] == fed[2] == fed[4]

    buffers = []
    for world in (1, 2, 4):
        snapshot = checkpoint.read_newest(tmp_path / f"w{world}" / "pretrain")
        assert snapshot is not None
        buffers.append({name: t for name, t in snapshot.model.items() if name.startswith("buffer/")})
    assert buffers[0]
    for other in buffers[1:]:
        for name, tensor in buffers[0].items():
            assert torch.equal(tensor, other[name]), name

    other_seed = recipe.model_copy(update={"seed": 1})
    different = _train(other_seed, tmp_path / "seed1", 1, ["pretrain"])
    assert not set(different.values()) & set(fed[1].values())


@pytest.mark.parametrize("objective", ["pgd", "trades"])
def test_one_step_agrees_within_rounding(fashion_data: Path, tmp_path: Path, objective: str) -> None:
    one = {"epochs": 1, "lr": 0.1, "weight_decay": 1e-4}
    recipe = small_recipe(
        fashion_data,
        phases={"pretrain": one},
        objective={"name": objective},
        data={"train_images": 64},
        evaluation={"validation_steps": 0},
    )
    states = []
    for world in (1, 2, 4):
        _train(recipe, tmp_path / f"w{world}", world, ["pretrain"])
        snapshot = checkpoint.read_newest(tmp_path / f"w{world}" / "pretrain")
        assert snapshot is not None
        assert snapshot.progress.step == 1
        states.append(snapshot.model | snapshot.optimizer)
    for other in states[1:]:
        assert other.keys() == states[0].keys()
        for name, tensor in states[0].items():
            torch.testing.assert_close(other[name], tensor, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_accuracies_agree_between_world_sizes(fashion_data: Path, tmp_path: Path) -> None:
    """Trained on 1 and on 2 workers: robust and clean accuracy on the test set, each inside the other's interval."""
    recipe = small_recipe(fashion_data, phases={"pretrain": {"epochs": 3, "lr": 0.1}}, data={"train_images": 2560})
    results = {}
    for world in (1, 2):
        _train(recipe, tmp_path / f"w{world}", world, ["pretrain"])
        results[world] = read_json(tmp_path / f"w{world}" / "pretrain" / "evaluate" / "pgd.json")
    for column in ("clean_correct", "robust_correct"):
        one, two = (results[w][column] / results[w]["images"] for w in (1, 2))
        assert one > 0.3, f"{column}: nothing was learnt, so agreement would mean nothing"
        low, high = wilson_interval(results[1][column], results[1]["images"])
        assert low - (high - low) / 2 <= two <= high + (high - low) / 2, column
