"""1, 2 and 4 workers: the same images, crops and attack noise at every step, and results that agree."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.distributed import Group
from pipeline.recipe.file import dump_recipe
from pipeline.recipe.schema import Recipe
from pipeline.recipe.stages import stages_of
from pipeline.run import checkpoint
from pipeline.run.files import atomic_write_text, read_json
from pipeline.run.lease import Leases
from pipeline.training.context import RunContext
from pipeline.training.perturbation_memory import EPOCHS, VALUES
from pipeline.training.stage import run_stages
from tests.support.processes import run_group
from tests.support.small_recipe import small_recipe

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
    run_stages(RunContext(recipe, folder, token, group, observe), stages)
    return fed


WORLDS = (1, 2, 4)
PRETRAIN, PRETRAIN_TO_PRUNE = ["pretrain"], ["pretrain", "keep-0.1/prune"]


def _recipes(data: Path, world: int) -> dict[str, tuple[Recipe, list[str]]]:
    """What a group of `world` workers runs: name -> (recipe, stages)."""
    still = {"epochs": 2, "lr": 1e-30, "weight_decay": 0.0}
    crops = {"augmentation": "pad_crop_flip", "train_images": 320}
    unvalidated = {"validation_steps": 0}
    both = {"data": crops, "evaluation": unvalidated}
    stands_still = small_recipe(data, phases={"pretrain": still, "prune": still}, **both)
    recipes = {"still": (stands_still, PRETRAIN_TO_PRUNE)}
    remembers = {"name": "fgsm_pgi", "step_size": "1/10", "reset_epochs": 2, "overfitting_guard": None}
    recipe = small_recipe(data, phases={"pretrain": still | {"epochs": 3}}, objective=remembers, **both)
    recipes["remembers"] = (recipe, PRETRAIN)
    one_step = {"pretrain": {"epochs": 1, "lr": 0.1, "weight_decay": 1e-4}}
    for name in ("pgd", "trades"):
        recipe = small_recipe(
            data, phases=one_step, objective={"name": name}, data={"train_images": 64}, evaluation=unvalidated
        )
        recipes[name] = (recipe, PRETRAIN)
    if world == 1:
        recipes["other seed"] = (stands_still.model_copy(update={"seed": 1}), PRETRAIN)
    if world <= 2:
        learns = small_recipe(data, phases={"pretrain": {"epochs": 3, "lr": 0.1}}, data={"train_images": 2560})
        recipes["learns"] = (learns, PRETRAIN)
    return recipes


def _run_all(group: Group, jobs: list[tuple[str, Recipe, Path, str, list[str]]]) -> dict[str, Fed]:
    return {name: _run(group, recipe, folder, token, stages) for name, recipe, folder, token, stages in jobs}


@pytest.fixture(scope="module")
def trained(fashion_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, dict[str, Fed]]]:
    """All runs of all world sizes, one group of processes for each: starting them is what takes time."""
    root = tmp_path_factory.mktemp("worlds")
    fed: dict[int, dict[str, Fed]] = {}
    for world in WORLDS:
        jobs, leases = [], []
        for name, (recipe, stages) in _recipes(fashion_data, world).items():
            folder = root / f"{name}-{world}"
            folder.mkdir()
            atomic_write_text(folder / "recipe.yaml", dump_recipe(recipe))
            leases.append(Leases([folder / stage for stage in stages]))
            jobs.append((name, recipe, folder, leases[-1].token, stages))
        try:
            parts = run_group(world, _run_all, jobs)
        finally:
            for lease in leases:
                lease.release()
        fed[world] = {job[0]: {k: v for part in parts for k, v in part[job[0]].items()} for job in jobs}
    return root, fed


def _final(root: Path, name: str, world: int) -> checkpoint.Snapshot:
    snapshot = checkpoint.read_newest_checkpoint(root / f"{name}-{world}" / "pretrain")
    assert snapshot is not None
    return snapshot


def test_every_world_size_feeds_the_same_tensors(trained: tuple[Path, dict[int, dict[str, Fed]]]) -> None:
    """The network stands still (a learning rate that vanishes in float32), so that what differs can only come from the
    data, the crops, the noise and BatchNorm's statistics; all fed tensors must be equal, bit for bit, at every step."""
    root, all_fed = trained
    fed = {world: all_fed[world]["still"] for world in WORLDS}
    assert len(fed[1]) == 2 * 2 * 5 * 4  # stages, epochs, steps, micro-batches
    assert len(set(fed[1].values())) == len(fed[1]), "two steps were fed the same tensor"
    assert fed[1] == fed[2] == fed[4]
    assert not set(all_fed[1]["other seed"].values()) & set(fed[1].values())

    buffers = {name: t for name, t in _final(root, "still", 1).model.items() if name.startswith("buffer/")}
    assert buffers
    for world in WORLDS[1:]:
        other = _final(root, "still", world).model
        for name, tensor in buffers.items():
            assert torch.equal(tensor, other[name]), name


def test_every_world_size_remembers_the_same_perturbations(trained: tuple[Path, dict[int, dict[str, Fed]]]) -> None:
    """Each epoch starts from what other workers have written in the one before."""
    root, all_fed = trained
    fed = {world: all_fed[world]["remembers"] for world in WORLDS}
    assert len(set(fed[1].values())) == len(fed[1]) == 3 * 5 * 4  # epochs, steps, micro-batches
    assert fed[1] == fed[2] == fed[4]
    one, *others = [_final(root, "remembers", world).train_state for world in WORLDS]
    assert len(one[VALUES]) == 320
    assert float((one[VALUES] != 0).float().mean()) > 0.5
    for name in (VALUES, EPOCHS):
        assert all(torch.equal(one[name], other[name]) for other in others), name


@pytest.mark.parametrize("objective", ["pgd", "trades"])
def test_one_step_agrees_within_rounding(trained: tuple[Path, dict[int, dict[str, Fed]]], objective: str) -> None:
    snapshots = [_final(trained[0], objective, world) for world in WORLDS]
    assert all(snapshot.progress.step == 1 for snapshot in snapshots)
    first, *others = [snapshot.model | snapshot.train_state for snapshot in snapshots]
    for other in others:
        assert other.keys() == first.keys()
        for name, tensor in first.items():
            torch.testing.assert_close(other[name], tensor, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_accuracies_agree_between_world_sizes(trained: tuple[Path, dict[int, dict[str, Fed]]]) -> None:
    """Trained on 1 and on 2 workers: clean and robust accuracy on the test set, with intervals that overlap."""
    root, _ = trained
    one, two = (read_json(root / f"learns-{w}" / "pretrain" / "evaluate" / "pgd.json") for w in (1, 2))
    for column in ("clean_accuracy", "robust_accuracy"):
        assert one[column]["value"] > 0.3, f"{column}: nothing was learnt, so agreement would mean nothing"
        assert one[column]["low"] <= two[column]["high"], column
        assert two[column]["low"] <= one[column]["high"], column
