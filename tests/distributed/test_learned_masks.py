"""HARP, and S2AP with blocks, on 1, 2 and 4 workers: the same masks, and of HARP the exact budget."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pipeline.distributed import Group
from pipeline.recipe.file import dump_recipe
from pipeline.recipe.schema import Recipe
from pipeline.recipe.stages import stages_of
from pipeline.run import checkpoint
from pipeline.run.files import atomic_write_text, read_json, read_rows
from pipeline.run.lease import Leases
from pipeline.training.context import RunContext
from pipeline.training.stage import run_stages
from tests.support.processes import run_group
from tests.support.small_recipe import small_recipe

pytestmark = pytest.mark.timeout(900)
WORLDS = (1, 2, 4)
FOLDER = "keep-0.05"
PRUNE = {"hydra": f"{FOLDER}/prune", "harp": f"{FOLDER}/hydra-harp/prune", "s2ap": f"{FOLDER}/s2ap-1x4/prune"}
BASELINES = [{"name": "hydra", "allocation": "harp"}, {"name": "s2ap", "structure": "1x4"}]
FINETUNE = f"{FOLDER}/hydra-harp/finetune"


def recipe_of(data: Path) -> Recipe:
    """Two epochs of two steps per phase. Attacks take no signs, which would turn rounding errors into other images;
    the dense network stands still, so that all prune the same weights."""
    phase = {"epochs": 2, "lr": 0.1, "weight_decay": 1.0e-4}
    return small_recipe(
        data,
        objective={"name": "pgd", "steps": 2, "step_size": "1/5"},
        threat_model={"norm": "l2", "eps": "1/4"},
        phases={"pretrain": phase | {"lr": 1e-30, "weight_decay": 0.0}, "prune": phase, "finetune": phase},
        sparsity={"keep_fractions": [0.05], "baselines": BASELINES},
        data={"train_images": 128, "validation_images": 50},
        evaluation={"images": 20, "chunk": 20, "honesty_images": 0, "validation_steps": 1},
        tracking={"log_every_steps": 1},
    )


def _run(group: Group, recipe: Recipe, folder: Path, token: str) -> None:
    stages = [stage for stage in stages_of(recipe) if stage.name in ("pretrain", *PRUNE.values(), FINETUNE)]
    run_stages(RunContext(recipe, folder, token, group), stages)


@pytest.fixture(scope="module")
def runs(fashion_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Number of workers -> folder of the run."""
    root, recipe = tmp_path_factory.mktemp("masks"), recipe_of(fashion_data)
    folders = {world: root / f"{world}" for world in WORLDS}
    for world, folder in folders.items():
        folder.mkdir()
        atomic_write_text(folder / "recipe.yaml", dump_recipe(recipe))
        lease = Leases([folder / stage.name for stage in stages_of(recipe)])
        try:
            run_group(world, _run, recipe, folder, lease.token, deadline_s=600)
        finally:
            lease.release()
    return folders


@pytest.mark.parametrize("method", PRUNE)
def test_masks_do_not_depend_on_the_number_of_workers(runs: dict[int, Path], method: str) -> None:
    results = [read_json(runs[world] / PRUNE[method] / "result.json") for world in WORLDS]
    assert len({result["mask_sha256"] for result in results}) == 1
    assert results[0]["layers"] == results[1]["layers"] == results[2]["layers"]
    snapshots = [checkpoint.read_newest_checkpoint(runs[world] / PRUNE[method]) for world in WORLDS]
    states = [one.model | one.train_state for one in snapshots if one is not None]
    assert any(name.startswith("rate/") for name in states[0]) == (method == "harp")
    for state in states[1:]:
        assert state.keys() == states[0].keys()
        for name, tensor in state.items():
            if name.startswith(("score/", "rate/", "buffer/")):
                torch.testing.assert_close(tensor, states[0][name], rtol=1e-3, atol=1e-5)


def test_methods_have_masks_of_their_own(runs: dict[int, Path]) -> None:
    assert len({read_json(runs[1] / stage / "result.json")["mask_sha256"] for stage in PRUNE.values()}) == len(PRUNE)


def test_harps_network_keeps_the_budget_and_is_finetuned_under_its_masks(runs: dict[int, Path]) -> None:
    """Four steps do not bring the shares from 10 % to the budget, but the result of the phase has it."""
    for folder in runs.values():
        pruned, finetuned = (read_json(folder / stage / "result.json") for stage in (PRUNE["harp"], FINETUNE))
        total = sum(layer["total"] for layer in pruned["layers"])
        assert sum(layer["kept"] for layer in pruned["layers"]) == total - total * 95 // 100
        assert finetuned["mask_sha256"] == pruned["mask_sha256"]
        assert finetuned["layers"] == pruned["layers"]
        rows = [row for row in read_rows(folder / PRUNE["harp"] / "metrics.jsonl") if row["kind"] == "train"]
        assert [row["step"] for row in rows] == [1, 2, 3, 4]
        assert 1 > rows[0]["over_budget"] > rows[-1]["over_budget"] > 0
        assert rows[-1]["mask_drift"]["since_start"] > 0
