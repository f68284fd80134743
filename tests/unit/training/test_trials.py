"""Choosing the best of a method's trials: by held-out images alone, and with the same files however it is killed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.distributed import Group
from pipeline.models import build_network
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
from pipeline.run.records import StageResult
from pipeline.training.context import RunContext
from pipeline.training.trials import choose_trial, held_out_robust_accuracy
from tests.support.killed_writes import kill_at_every_file
from tests.support.small_recipe import small_recipe

STEP = 40
RATES = (0.01, 0.03, 0.1)


@dataclass
class Tuned:
    """A run whose trials are finished."""

    run: Path
    recipe: Recipe
    stage: Stage
    leases: Leases

    @property
    def folder(self) -> Path:
        return self.run / self.stage.name

    def trial(self, number: int) -> Path:
        return self.run / self.stage.trials[number - 1].stage

    def choose(self) -> dict[str, Any]:
        choose_trial(RunContext(self.recipe, self.run, self.leases.token, Group(0, 1, torch.device("cpu"))), self.stage)
        return read_json(self.folder / "result.json")

    def set_accuracies(self, *accuracies: float) -> None:
        for number, accuracy in enumerate(accuracies, 1):
            path = self.trial(number) / "result.json"
            atomic_write_json(path, read_json(path) | {"held_out_robust_accuracy": accuracy})

    def files(self) -> dict[str, bytes]:
        """Those of the stage, but for its lease and for what a killed process could not remove."""
        paths = [path for path in self.folder.rglob("*") if path.is_file() and path.suffix != ".tmp"]
        return {str(path.relative_to(self.folder)): path.read_bytes() for path in paths if "lease" not in path.name}


def finish_trial(folder: Path, recipe: Recipe, stage: Stage, number: int) -> None:
    folder.mkdir(parents=True)
    live = build_network(recipe.model, number, 28)
    assert stage.keep_fraction is not None
    Scores.attach(live, stage.keep_fraction)
    state = {name: tensor.detach().clone() for name, tensor in named_state(live).items()}
    checkpoint.write_checkpoint(folder, Snapshot(state, {}, Progress(STEP, STEP // 2, STEP)))
    network = folder / "model.safetensors"
    write_model(network, effective_state(live), recipe.model, {"keep_fraction": "0.1", "image_size": 28})
    facts = {
        "phase": stage.phase,
        "keep_fraction": "0.1",
        "steps": STEP,
        "selected_step": STEP,
        "mask_sha256": "m" * 64,
    }
    facts |= {"model_sha256": sha256_of(network), "layers": [{"name": "fc", "kept": 1, "total": 10}]}
    atomic_write_json(folder / "result.json", {"stage": stage.trials[number - 1].stage} | facts)
    atomic_write_json(folder / "stage.json", stage.describe(STEP // 2) | {"batch_per_step": 64})
    (folder / "metrics.jsonl").write_text(json.dumps({"kind": "train", "step": STEP, "loss": number}) + "\n")


@pytest.fixture(params=["finetune", "magnitude"])
def tuned(request: pytest.FixtureRequest, tmp_path: Path, fashion_data: Path) -> Iterator[Tuned]:
    recipe = small_recipe(fashion_data, sparsity={"tune": {"finetune_lr": list(RATES)}})
    stage = next(stage for stage in stages_of(recipe) if stage.name == f"keep-0.1/{request.param}")
    for number, trial in enumerate(stage.trials, 1):
        finish_trial(tmp_path / trial.stage, recipe, stage, number)
    leases = Leases([tmp_path / stage.name])
    yield Tuned(tmp_path, recipe, stage, leases)
    leases.release()


@pytest.mark.parametrize(
    ("accuracies", "best"), [((0.2, 0.5, 0.4), 2), ((0.5, 0.4, 0.5), 1), ((0.1, 0.3, 0.3), 2), ((0.0, 0.0, 0.0), 1)]
)
def test_the_highest_accuracy_is_chosen_and_the_first_of_equal_ones(
    tuned: Tuned, accuracies: tuple[float, ...], best: int
) -> None:
    tuned.set_accuracies(*accuracies)
    result, trial = tuned.choose(), tuned.trial(best)
    own = {key: value for key, value in read_json(trial / "result.json").items() if key != "held_out_robust_accuracy"}
    assert {key: value for key, value in result.items() if key != "tuned"} == own | {"stage": tuned.stage.name}
    prune = {"prune_lr": 0.05} if tuned.stage.phase == "finetune" else {}
    assert result["tuned"] == [
        {
            "stage": each.stage,
            "finetune_lr": lr,
            **prune,
            "held_out_robust_accuracy": accuracy,
            "chosen": number == best,
        }
        for number, (each, lr, accuracy) in enumerate(zip(tuned.stage.trials, RATES, accuracies, strict=True), 1)
    ]
    parsed = StageResult.read(tuned.folder / "result.json")
    assert parsed.chosen is not None
    assert parsed.chosen.stage == tuned.stage.trials[best - 1].stage
    for name in ("model.safetensors", "metrics.jsonl", *(f"step-{STEP:010d}/{name}" for name in checkpoint.CONTENT)):
        assert (tuned.folder / name).read_bytes() == (trial / name).read_bytes(), name
    checkpoint.check_checkpoint(checkpoint.folder_of(tuned.folder, STEP))
    plan = read_json(trial / "stage.json") | {"stage": tuned.stage.name, "trials": 3}
    assert read_json(tuned.folder / "stage.json") == plan


def test_nothing_of_the_test_set_decides(tuned: Tuned) -> None:
    """Neither evaluations of trials, if somebody made some, nor the test file, which may be missing."""
    tuned.set_accuracies(0.2, 0.5, 0.4)
    expected = tuned.choose()
    for number, accuracy in ((1, 0.99), (2, 0.01), (3, 0.5)):
        (tuned.trial(number) / "evaluate").mkdir()
        value = {"value": accuracy, "low": 0.0, "high": 1.0}
        atomic_write_json(tuned.trial(number) / "evaluate" / "pgd.json", {"attack": "pgd", "robust_accuracy": value})
    data = tuned.recipe.data.model_copy(update={"test_file": "/nowhere/test.beton"})
    tuned.recipe = tuned.recipe.model_copy(update={"data": data})
    assert tuned.choose() == expected
    assert not (tuned.folder / "evaluate").exists()


@pytest.mark.parametrize("tuned", ["magnitude"], indirect=True)
def test_killed_at_any_file_and_resumed_it_leaves_the_same_files(tuned: Tuned) -> None:
    tuned.set_accuracies(0.2, 0.5, 0.4)
    tuned.choose()
    expected = tuned.files()
    assert "result.json" in expected
    kills = 0
    for before in kill_at_every_file(tuned.folder, tuned.choose):
        kills += 1
        assert before is False or not (tuned.folder / "result.json").exists(), "the last file"
        tuned.choose()
        assert tuned.files() == expected
    assert kills == 2 * 6, "manifest, LATEST, network, rows, plan, result"


def test_nothing_is_written_once_the_lease_is_lost(tuned: Tuned) -> None:
    tuned.set_accuracies(0.2, 0.5, 0.4)
    tuned.leases.release()
    with pytest.raises(LeaseHeld):
        tuned.choose()
    assert tuned.files() == {}


def test_damage_is_an_error_that_names_the_file_and_the_fix(tuned: Tuned) -> None:
    tuned.set_accuracies(0.2, 0.5)
    result = tuned.trial(3) / "result.json"
    with pytest.raises(ValueError, match=rf"^{result} is damaged: held_out_robust_accuracy is missing; restore it, or"):
        tuned.choose()
    tuned.set_accuracies(0.2, 0.5, 0.4)
    network = tuned.trial(2) / "model.safetensors"
    original = network.read_bytes()
    network.write_bytes(original[:-1])
    with pytest.raises(ValueError, match=rf"^{network} is not the network that the trial exported .* resume the run$"):
        tuned.choose()
    network.write_bytes(original)
    (checkpoint.folder_of(tuned.trial(2), STEP) / "progress.json").write_text("{}")
    with pytest.raises(ValueError, match=rf"does not match its MANIFEST.json.* delete {tuned.trial(2)} and resume"):
        tuned.choose()
    assert not (tuned.folder / "result.json").exists()
    tuned.set_accuracies(0.6)
    assert tuned.choose()["tuned"][0]["chosen"], "the others may be damaged"
    path = tuned.folder / "result.json"
    values = read_json(path)
    values["tuned"][1]["chosen"] = True
    atomic_write_json(path, values)
    with pytest.raises(ValueError, match=rf"^{path} is damaged: .*of 3 tuned trials, 2 are chosen"):
        StageResult.read(path)


def test_a_trials_accuracy_is_that_of_the_row_of_its_step(tmp_path: Path) -> None:
    """Held-out rows alone, and with best_validation_robust the step is not the last one."""
    rows = [{"kind": "train", "step": 20, "robust_accuracy": 0.9}]
    rows += [{"kind": "validation", "step": step, "robust_accuracy": step / 100} for step in (20, 40)]
    rows += [{"kind": "validation", "step": 60, "robust_accuracy": None}]
    lines = [json.dumps(row | {"timing": {"seconds": 1.0}}) + "\n" for row in rows]
    (tmp_path / "metrics.jsonl").write_text("".join(lines))
    assert held_out_robust_accuracy(tmp_path, 20) == 0.2
    assert held_out_robust_accuracy(tmp_path, 40) == 0.4
    for step in (30, 60):
        with pytest.raises(ValueError, match=rf"metrics.jsonl has no accuracy on the held-out images at step {step}"):
            held_out_robust_accuracy(tmp_path, step)
