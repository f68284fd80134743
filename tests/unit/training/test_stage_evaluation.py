"""Honesty checks inside a run: made once, of the network that was trained, also after interruptions."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.data.loading.loader import Batch
from pipeline.data.manifest import read_manifest
from pipeline.data.sources.fashion_mnist import IDX_FILES, find_fashion_mnist, read_idx
from pipeline.distributed import Group
from pipeline.evaluation.honesty.runner import trained_network
from pipeline.models import Network, build_network
from pipeline.models.export import write_model
from pipeline.models.pruning.scores import Scores
from pipeline.models.state import effective_state, named_state
from pipeline.recipe.schema import Recipe
from pipeline.recipe.stages import Stage, stages_of
from pipeline.run import checkpoint
from pipeline.run.checkpoint import Snapshot
from pipeline.run.files import atomic_write_json, read_json, sha256_of
from pipeline.run.lease import LeaseHeld, Leases
from pipeline.run.progress import Progress
from pipeline.run.stop import StopRequested
from pipeline.training.context import RunContext
from pipeline.training.stage_evaluation import check_honesty
from tests.conftest import TEST_IMAGES
from tests.support.small_recipe import small_recipe

STEP = 3


class InMemory:
    """What is asked of a Loader here, without its kernel, which takes seconds to compile."""

    def __init__(self, path: Path) -> None:
        self.path, (images, labels), source = path, IDX_FILES["test"], find_fashion_mnist(None)
        pixels = torch.from_numpy(read_idx(source, images, 3)[:TEST_IMAGES].copy())
        self._images = pixels[:, None].expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)
        self._labels = torch.from_numpy(read_idx(source, labels, 1)[:TEST_IMAGES].copy()).long()
        self.image_size = 28
        self.identity = {"data_sha256": read_manifest(path).sha256}
        self.num_samples, self.heights, self.widths = TEST_IMAGES, *(np.full(TEST_IMAGES, 28),) * 2

    def batches(self, plan: Any) -> Iterator[Batch]:
        for ids, _ in plan:
            yield Batch(self._images[ids], self._labels[ids], torch.from_numpy(ids))


@pytest.fixture(scope="module")
def loader(fashion_data: Path) -> Any:
    return InMemory(fashion_data / "test.beton")


@dataclass
class Finished:
    """A stage whose network is written, but not evaluated."""

    loader: Any
    run: Path
    recipe: Recipe
    stage: Stage
    leases: Leases
    chunks: list[dict[str, Any]] = field(default_factory=list)
    """Its message for each finished chunk."""

    @property
    def folder(self) -> Path:
        return self.run / self.stage.name

    @property
    def target(self) -> Path:
        return self.folder / "honesty.json"

    def job(self, stop: Callable[[], bool] = lambda: False) -> RunContext:
        group = Group(0, 1, torch.device("cpu"))
        job = RunContext(self.recipe, self.run, self.leases.token, group, self.observe, stop)
        job._loaders[self.recipe.data.test_file] = self.loader
        return job

    def observe(self, event: str, facts: dict[str, Any]) -> None:
        if event == "chunk":
            self.chunks.append(facts)

    def check(self, stop: Callable[[], bool] = lambda: False) -> dict[str, Any]:
        check_honesty(self.job(stop), self.stage)
        return read_json(self.target)


def finish(stage_folder: Path, recipe: Recipe, live: Network) -> None:
    """What a stage leaves when it has trained."""
    stage_folder.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.detach().clone() for name, tensor in named_state(live).items()}
    checkpoint.write_checkpoint(stage_folder, Snapshot(state, {}, Progress(STEP, STEP, STEP)))
    model = stage_folder / "model.safetensors"
    write_model(model, effective_state(live), recipe.model, {"keep_fraction": "0.1", "image_size": 28})
    atomic_write_json(stage_folder / "result.json", {"selected_step": STEP, "model_sha256": sha256_of(model)})


@pytest.fixture
def finished(tmp_path: Path, loader: Any, fashion_data: Path) -> Iterator[Finished]:
    recipe = small_recipe(fashion_data, evaluation={"honesty_images": 6, "chunk": 2, "steps": 1})
    (stage,) = [stage for stage in stages_of(recipe) if stage.phase == "finetune"]
    leases = Leases([tmp_path / stage.name])
    live = build_network(recipe.model, 5, 28)
    assert stage.keep_fraction is not None
    Scores.attach(live, stage.keep_fraction)
    finish(tmp_path / stage.name, recipe, live)
    yield Finished(loader, tmp_path, recipe, stage, leases)
    leases.release()


def verdict_of(written: dict[str, Any], name: str) -> str:
    (verdict,) = [check["verdict"] for check in written["checks"] if check["name"] == name]
    return verdict


def test_the_file_says_what_was_found_and_of_what(finished: Finished, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        written = finished.check()
    assert written["images"] == 6
    assert written["chunk"] == 2
    assert written["model_sha256"] == sha256_of(finished.folder / "model.safetensors")
    assert written["settings"]["eps"] == "1/10"
    assert [set(check) for check in written["checks"]] == [{"name", "verdict", "figure", "meaning"}] * 11
    assert verdict_of(written, "exported file") == verdict_of(written, "mask") == "pass"
    assert finished.chunks == [{"stage": finished.stage.name, "done": done} for done in (1, 2, 3)]
    passing = sum(check["verdict"] == "pass" for check in written["checks"])
    assert f"{finished.stage.name}: {passing} of 11 honesty checks pass" in caplog.messages
    assert not list(finished.folder.rglob("*.chunks"))


def test_it_is_made_once_for_a_network(finished: Finished) -> None:
    first = finished.check()
    finished.chunks.clear()
    assert finished.check() == first
    assert finished.chunks == []
    recipe, live = finished.recipe, trained_network(finished.recipe, finished.folder, finished.stage)
    assert live is not None
    with torch.no_grad():
        live.backbone.get_parameter("fc2.bias").add_(1.0)
    shutil.rmtree(finished.folder / f"step-{STEP:010d}")
    finish(finished.folder, recipe, live)
    again = finished.check()
    assert len(finished.chunks) == 3
    assert again["model_sha256"] != first["model_sha256"]
    finished.target.write_text("{torn")
    assert finished.check() == again


def test_an_interrupted_evaluation_resumes_with_the_next_chunk(finished: Finished) -> None:
    with pytest.raises(StopRequested):
        finished.check(stop=lambda: len(finished.chunks) == 2)
    assert not finished.target.exists()
    resumed = finished.check()
    assert len(finished.chunks) == 3
    finished.target.unlink()
    assert finished.check() == resumed


def test_recipes_not_evaluated_with_pgd_have_no_honesty_checks(finished: Finished) -> None:
    data = Path(finished.recipe.data.test_file).parent
    smoothed = {"objective": {"name": "noise", "sigma": "1/4"}, "threat_model": {"norm": "l2", "eps": "1/4"}}
    for changed in (smoothed, {"evaluation": {"honesty_images": 0}}):
        finished.recipe = small_recipe(data, **changed)
        check_honesty(finished.job(), finished.stage)
        assert not finished.target.exists()


def test_the_trained_network_is_the_one_of_the_checkpoint(finished: Finished) -> None:
    """A file of another network, and one whose mask was left out, are both caught."""
    live = trained_network(finished.recipe, finished.folder, finished.stage)
    assert live is not None
    dense = {name.removeprefix("weight/").removeprefix("buffer/"): tensor for name, tensor in named_state(live).items()}
    dense = {name: tensor for name, tensor in dense.items() if not name.startswith("score/")}
    facts = {"keep_fraction": "0.1", "image_size": 28}
    write_model(finished.folder / "model.safetensors", dense, finished.recipe.model, facts)
    written = finished.check()
    assert verdict_of(written, "exported file") == verdict_of(written, "mask") == "warn"


def test_a_checkpoint_that_is_gone_is_a_warning(finished: Finished, caplog: pytest.LogCaptureFixture) -> None:
    shutil.rmtree(finished.folder / f"step-{STEP:010d}")
    written = finished.check()
    (check,) = [check for check in written["checks"] if check["name"] == "exported file"]
    assert check["verdict"] == "warn"
    assert "the trained network's checkpoint is missing" in check["figure"]
    assert any("honesty check exported file" in message for message in caplog.messages)


def test_nothing_is_written_once_the_lease_is_lost(finished: Finished) -> None:
    finished.leases.release()
    with pytest.raises(LeaseHeld):
        finished.check()
    assert not finished.target.exists()
