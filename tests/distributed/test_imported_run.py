"""A run of two workers whose dense network is a file: evaluated, pruned and reported like one that was trained."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from launch.commands.status import status_text
from pipeline.models import build_network
from pipeline.models.import_weights import load_foreign
from pipeline.recipe.schema import Recipe
from pipeline.report.build import build_report
from pipeline.run import checkpoint
from pipeline.run.files import read_json, sha256_of
from pipeline.run.layout import StageFolder
from pipeline.run.provenance import load_run_recipe
from tests.support.small_recipe import small_recipe
from tests.support.undisturbed_run import calm_run

pytestmark = pytest.mark.timeout(900)
SPARSE = ("keep-0.01/prune", "keep-0.01/finetune", "keep-0.01/magnitude")


def recipe_of(data: Path, weights: Path) -> Recipe:
    """Two steps per phase, on images that take no time."""
    phase = {"epochs": 1, "lr": 0.05, "weight_decay": 1.0e-4}
    return small_recipe(
        data,
        model={"weights": str(weights)},
        phases={"pretrain": None, "prune": phase, "finetune": phase},
        sparsity={"keep_fractions": [0.01]},
        data={"train_images": 128, "validation_images": 50},
        evaluation={"images": 20, "chunk": 10, "honesty_images": 4},
        workers={"count": 2},
        tracking={"log_every_steps": 1},
    )


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory, fashion_data: Path) -> tuple[Path, dict[str, Tensor]]:
    """(file, as RobustBench has them; the state dict in it)."""
    file = tmp_path_factory.mktemp("weights") / "Robust2026.pt"
    state = build_network(recipe_of(fashion_data, file).model, 99).backbone.state_dict()
    torch.save({"state_dict": {f"module.model.{name}": tensor for name, tensor in state.items()}}, file)
    return file, state


def test_a_network_that_others_trained_is_pruned_as_it_is(
    tmp_path: Path, fashion_data: Path, state: tuple[Path, dict[str, Tensor]]
) -> None:
    file, expected = state
    recipe = recipe_of(fashion_data, file)
    run = calm_run(tmp_path / "run", recipe)
    dense = StageFolder(run / "pretrain")
    exported = load_file(dense.network)
    assert exported.keys() == expected.keys()
    assert all(torch.equal(exported[name], tensor) for name, tensor in expected.items())
    evaluation = read_json(dense.evaluation("pgd"))
    assert (evaluation["model_sha256"], evaluation["images"]) == (sha256_of(dense.network), 20)
    checks = {check["name"]: check["verdict"] for check in read_json(dense.honesty)["checks"]}
    assert checks["exported file"] == "pass", "the file is that of the checkpoint"
    assert read_json(run / "provenance.json")["data_sha256"]["model.weights"] == sha256_of(file)

    prune = checkpoint.read_newest_checkpoint(run / SPARSE[0])
    assert prune is not None
    scored = [name.removeprefix("score/") for name in prune.model if name.startswith("score/")]
    assert len(scored) >= 4
    assert all(torch.equal(prune.model[f"weight/{name}"], expected[name]) for name in scored), "only scores learn"
    for stage in SPARSE:
        assert read_json(run / stage / "result.json")["steps"] in (2, 4)
    pruned = load_file(StageFolder(run / SPARSE[1]).network)
    weights = [name for name in pruned if name.endswith(".weight")]
    share = sum(int(pruned[name].count_nonzero()) for name in weights) / sum(pruned[name].numel() for name in weights)
    assert share <= 0.011

    assert "4 of 4 stages finished" in (status := status_text([run]))
    assert next(line for line in status.splitlines() if "pretrain" in line).split()[1:4] == ["finished", "-", "-"]
    assert "dense" in build_report([run])
    page = (run / "report" / "report.html").read_text()
    assert str(file) in page, "where the dense network is from"
    assert all(json.loads(line)["kind"] for line in (run / SPARSE[0] / "metrics.jsonl").read_text().splitlines())

    again = build_network(recipe.model, 3)
    load_foreign(again, run, load_run_recipe(run).model)
    assert all(torch.equal(again.backbone.state_dict()[name], tensor) for name, tensor in expected.items())
