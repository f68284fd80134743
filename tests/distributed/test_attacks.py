"""All evaluations of a stage: one worker, and four that were killed twice and stopped twice, give equal files."""

from __future__ import annotations

import functools
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from pipeline.data.loading.loader import Loader
from pipeline.data.loading.sampling import whole_image_crops
from pipeline.distributed import Group
from pipeline.evaluation import spec
from pipeline.evaluation.chunks import read_verdicts
from pipeline.evaluation.measures.autoattack import Ensemble
from pipeline.models import build_network
from pipeline.models.export import write_model
from pipeline.models.state import effective_state
from pipeline.recipe.file import dump_recipe, load_recipe
from pipeline.recipe.schema import Recipe
from pipeline.recipe.stages import Stage, stages_of
from pipeline.run.files import atomic_write_text, read_json
from pipeline.run.layout import StageFolder, unevaluated
from pipeline.run.lease import Leases
from pipeline.run.stop import StopRequested
from pipeline.training.context import RunContext
from pipeline.training.stage_evaluation import evaluate_stage
from tests.support.processes import run_group
from tests.support.small_recipe import small_recipe

STAGE = "keep-0.1/finetune"
IMAGES, CHUNK, WORLD = 38, 8, 4  # the last chunk is smaller
ATTACKS = [
    {"name": "apgd", "images": IMAGES, "chunk": CHUNK},
    {"name": "square", "images": IMAGES, "chunk": CHUNK},
    {"name": "transfer", "steps": 2, "restarts": 2, "images": IMAGES, "chunk": CHUNK},
]


class Killed(BaseException):
    """What ended an evaluation."""


def _recipe(data: Path) -> Recipe:
    evaluation = {"steps": 2, "step_size": "1/100", "images": IMAGES, "chunk": CHUNK, "attacks": ATTACKS}
    return small_recipe(data, threat_model={"norm": "linf", "eps": "1/40"}, evaluation=evaluation)


def _stage(recipe: Recipe) -> Stage:
    return next(stage for stage in stages_of(recipe) if stage.name == STAGE)


def _evaluate(group: Group, folder: Path, token: str, kill_at: int | None = None, stop_at: int | None = None) -> str:
    """Evaluate what is left, and say how that ended. `kill_at`: a chunk; `stop_at`: a pass, of the last rank."""
    spec.Ensemble = functools.partial(Ensemble, iterations=3, queries=100)  # pyright: ignore
    recipe = load_recipe(folder / "recipe.yaml")
    counts = {"chunk": 0, "pass": 0}

    def observe(event: str, facts: dict[str, Any]) -> None:
        counts[event] += 1
        if event == "chunk" and counts["chunk"] == kill_at:
            raise Killed

    def stop_requested() -> bool:
        return stop_at is not None and group.rank == group.world - 1 and counts["pass"] >= stop_at

    context = RunContext(recipe, folder, token, group, observe, stop_requested)
    stage = _stage(recipe)
    labels = group.broadcast(unevaluated(folder, stage))
    try:
        for _ in evaluate_stage(context, stage, labels):
            pass
    except (StopRequested, Killed) as ended:
        return type(ended).__name__
    finally:
        context.close()
    return "done"


def _stopped_then_done(group: Group, folder: Path, token: str) -> list[str]:
    return [_evaluate(group, folder, token, stop_at=stop_at) for stop_at in (5, 8, None)]


@pytest.fixture(scope="module")
def run(fashion_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with a dense network of a few steps, and another beside it in place of a pruned one."""
    folder, recipe = tmp_path_factory.mktemp("attacked") / "run", _recipe(fashion_data)
    folder.mkdir()
    atomic_write_text(folder / "recipe.yaml", dump_recipe(recipe))
    with Loader(fashion_data / "train.beton", image_size=28, threads=1) as loader:
        ids = np.arange(1500)
        batch = loader.read(ids, whole_image_crops(np.full(1500, 28), np.full(1500, 28)))
    images, labels = batch.images.float().div(255), batch.labels
    for seed, stage in enumerate(("pretrain", STAGE)):
        network = build_network(recipe.model, seed=seed, image_size=28).train()
        optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
        for part in torch.arange(1500).view(-1, 50):
            optimizer.zero_grad()
            F.cross_entropy(network(images[part]), labels[part]).backward()
            optimizer.step()
        (folder / stage).mkdir(parents=True)
        write_model(folder / stage / "model.safetensors", effective_state(network), recipe.model, {"image_size": 28})
    return folder


def test_workers_and_interruptions_do_not_change_a_verdict(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spec, "Ensemble", spec.Ensemble)  # so that it is put back
    alone, shared = run.with_name("alone"), run.with_name("shared")
    for folder in (alone, shared):
        shutil.copytree(run, folder)
    one = Group(0, 1, torch.device("cpu"))
    leases = {folder: Leases([folder / STAGE]) for folder in (alone, shared)}
    try:
        assert _evaluate(one, alone, leases[alone].token) == "done"
        for kill_at in (3, 3):  # new chunks, of five of each measure
            assert _evaluate(one, shared, leases[shared].token, kill_at=kill_at) == "Killed"
        assert unevaluated(shared, _stage(load_recipe(shared / "recipe.yaml"))) == ["apgd", "square", "transfer-2x2"]
        ended = run_group(WORLD, _stopped_then_done, shared, leases[shared].token)
    finally:
        for lease in leases.values():
            lease.release()
    assert ended == [["StopRequested", "StopRequested", "done"]] * WORLD
    for label in ("pgd", "apgd", "square", "transfer-2x2"):
        paths = [StageFolder(folder / STAGE).evaluation(label) for folder in (alone, shared)]
        facts, others = (read_json(path) for path in paths)
        assert facts == others
        expected, actual = (read_verdicts(path.with_suffix(".parquet")) for path in paths)
        assert expected.keys() == actual.keys()
        assert [name for name in expected if not np.array_equal(expected[name], actual[name])] == []
        assert len(expected["sample_id"]) == IMAGES
        if label != "transfer-2x2":
            assert 0 < facts["robust_correct"] < facts["clean_correct"] < IMAGES, f"{label}: equality says little"
    left = [path.name for path in (shared / STAGE / "evaluate").iterdir() if path.suffix not in (".json", ".parquet")]
    assert left == []
