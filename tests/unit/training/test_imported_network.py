"""The dense stage of a recipe without a pretrain phase: the file's network, bit for bit, however it is interrupted."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from pipeline.distributed import Group
from pipeline.evaluation.honesty.runner import trained_network
from pipeline.models import build_network
from pipeline.models.export import load_model, read_metadata
from pipeline.recipe.file import recipe_hash
from pipeline.recipe.schema import Recipe
from pipeline.recipe.stages import Stage, stages_of
from pipeline.run import checkpoint
from pipeline.run.files import read_json, sha256_of
from pipeline.run.layout import StageFolder
from pipeline.run.lease import LeaseHeld, Leases
from pipeline.run.records import StageResult
from pipeline.training.context import RunContext
from pipeline.training.imported_network import import_network
from pipeline.training.stage_start import load_start
from tests.support.killed_writes import kill_at_every_file
from tests.support.small_recipe import small_recipe

ARCH = "vgg2_bn_cifar"


@dataclass
class Imported:
    """A run whose dense network comes from a file."""

    run: Path
    recipe: Recipe
    weights: dict[str, Tensor]
    """Of the file."""
    leases: Leases

    @property
    def stage(self) -> Stage:
        return stages_of(self.recipe)[0]

    @property
    def files(self) -> StageFolder:
        return StageFolder(self.run / "pretrain")

    def context(self) -> RunContext:
        return RunContext(self.recipe, self.run, self.leases.token, Group(0, 1, torch.device("cpu")))

    def make(self) -> None:
        context = self.context()
        try:
            import_network(context, self.stage)
        finally:
            context.close()

    def contents(self) -> dict[str, bytes]:
        """Those of the stage, but for its lease and for what a killed process could not remove."""
        folder = self.files.path
        paths = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".tmp"]
        return {str(path.relative_to(folder)): path.read_bytes() for path in paths if "lease" not in path.name}


@pytest.fixture
def imported(tmp_path: Path, fashion_data: Path) -> Iterator[Imported]:
    file = tmp_path / "robust.pt"
    recipe = small_recipe(
        fashion_data,
        data={"image_size": 28},
        model={"arch": ARCH, "weights": str(file)},
        phases={"pretrain": None},
    )
    weights = {name: tensor.clone() for name, tensor in build_network(recipe.model, 99).backbone.state_dict().items()}
    for name, tensor in weights.items():
        if name.endswith(("running_mean", "running_var")):
            tensor.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(len(name)))
        elif name.endswith("num_batches_tracked"):
            tensor.fill_(77)
    torch.save({"state_dict": {f"module.model.{name}": tensor for name, tensor in weights.items()}}, file)
    leases = Leases([tmp_path / "run" / "pretrain"])
    yield Imported(tmp_path / "run", recipe, weights, leases)
    leases.release()


def assert_equal(state: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert state.keys() == expected.keys()
    for name, tensor in state.items():
        assert tensor.dtype == expected[name].dtype
        assert torch.equal(tensor, expected[name]), name


def test_what_it_leaves_is_the_file_and_is_read_as_a_trained_stage(imported: Imported) -> None:
    imported.make()
    recipe, files = imported.recipe, imported.files
    assert_equal(load_file(files.network), imported.weights)
    assert_equal(load_model(files.network).backbone.state_dict(), imported.weights)
    metadata = read_metadata(files.network)
    assert (metadata["arch"], metadata["keep_fraction"], metadata["mask_sha256"]) == (ARCH, None, None)
    assert metadata["recipe_sha256"] == recipe_hash(recipe)
    assert {"class_names", "threat_model", "preprocessing"} <= metadata.keys()

    result = read_json(files.result)
    assert {key: value for key, value in result.items() if key != "layers"} == {
        "stage": "pretrain",
        "phase": "pretrain",
        "keep_fraction": None,
        "steps": 0,
        "selected_step": 0,
        "model_sha256": sha256_of(files.network),
        "mask_sha256": None,
    }
    assert all(layer.kept == layer.total for layer in StageResult.read(files.result).layers)
    plan = imported.stage.describe(20) | {"batch_per_step": 64, "weights": recipe.model.weights}
    assert read_json(files.plan) == plan

    trained = trained_network(recipe, files.path, imported.stage)
    assert trained is not None
    assert_equal(trained.backbone.state_dict(), imported.weights)
    prune = next(stage for stage in stages_of(recipe) if stage.trains == "scores")
    network = build_network(recipe.model, recipe.seed, 28)
    load_start(imported.context(), prune, network)
    plain = {
        name.replace(".parametrizations.weight.original", ".weight"): t for name, t in network.state_dict().items()
    }
    own = {name.removeprefix("backbone."): tensor for name, tensor in plain.items() if ".parametrizations." not in name}
    assert_equal(own, imported.weights)


def test_killed_at_any_file_and_started_again_it_leaves_the_same_files(imported: Imported) -> None:
    imported.make()
    expected, kills = imported.contents(), 0
    assert "result.json" in expected
    for before in kill_at_every_file(imported.files.path, imported.make):
        kills += 1
        assert before is False or not imported.files.result.exists(), "the last file"
        imported.make()
        assert imported.contents() == expected
    assert kills == 2 * 5, "plan, manifest, LATEST, network, result"


def test_nothing_is_written_without_the_lease_or_by_weights_that_do_not_fit(imported: Imported) -> None:
    imported.leases.release()
    with pytest.raises(LeaseHeld):
        imported.make()
    assert imported.contents() == {}
    torch.save({"a": torch.zeros(3)}, str(imported.recipe.model.weights))
    with pytest.raises(ValueError, match=r"robust\.pt does not fit model\.arch vgg2_bn_cifar"):
        imported.make()
    assert checkpoint.steps_on_disk(imported.files.path) == []
