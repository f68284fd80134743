"""Runs with `sparsity.tune` on two workers: trials are ordinary stages, chosen without the test set."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.data.loading.loader import Loader
from pipeline.distributed import Group
from pipeline.evaluation.images import EvaluationImages
from pipeline.evaluation.load import load_network
from pipeline.evaluation.measures.pgd import Pgd
from pipeline.evaluation.runner import Evaluator
from pipeline.models.export import load_model
from pipeline.recipe.file import dump_recipe
from pipeline.recipe.schema import Recipe
from pipeline.recipe.stages import stages_of
from pipeline.run import checkpoint
from pipeline.run.files import atomic_write_text, read_json, read_rows
from pipeline.run.layout import is_done
from pipeline.run.lease import Leases
from pipeline.training.context import RunContext
from pipeline.training.stage import run_stages
from tests.fault.final_state import unlike
from tests.support.processes import run_group
from tests.support.small_recipe import small_recipe

PER_EPOCH, HELD_OUT = 10, 200
TUNE = {"finetune_lr": [0.0001, 0.05], "prune_lr": [0.1, 0.05]}
CRASHES = [
    ("step", "keep-0.1/trial-2/prune", 7),
    ("step", "keep-0.1/trial-1/finetune", PER_EPOCH),
    ("stage_finished", "keep-0.1/trial-2/finetune", None),
    ("stage_finished", "keep-0.1/finetune", None),
    ("step", "keep-0.1/trial-2/snip", 3),
]
LASTS = ("keep-0.1/finetune", "keep-0.1/snip")


class Crash(RuntimeError):
    """The workers end at once."""


def _run(group: Group, recipe: Recipe, folder: Path, token: str, crashes: list[Any]) -> list[tuple[str, list[str]]]:
    """Run all stages, restarting after each crash: (stage, files that are open) when each had finished training."""
    finished: list[tuple[str, list[str]]] = []
    stages = stages_of(recipe)
    run_stages(RunContext(recipe, folder, token, group), stages[:1])
    while True:
        context = RunContext(recipe, folder, token, group)

        def observe(event: str, facts: dict[str, Any], context: RunContext = context) -> None:
            if event == "stage_finished":
                finished.append((facts["stage"], [Path(path).name for path in context._loaders]))
            if crashes[:1] == [(event, facts["stage"], facts.get("step"))]:
                crashes.pop(0)
                raise Crash

        context.observer = observe
        try:
            run_stages(context, stages[1:])
        except Crash:
            continue
        return finished


def _all(group: Group, jobs: list[tuple[Recipe, Path, str, list[Any]]]) -> list[list[tuple[str, list[str]]]]:
    return [_run(group, *job) for job in jobs]


@pytest.fixture(scope="module")
def runs(fashion_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Recipe, list[Any]]:
    """The folder with straight/, crashed/ and untuned/, the recipe of the first two, and what `_run` returned."""
    root = tmp_path_factory.mktemp("trials")
    phase = {"epochs": 1, "lr": 0.05}
    sections: dict[str, Any] = {
        "phases": {"pretrain": phase, "prune": phase, "finetune": phase | {"ema_decay": 0.5}},
        "batch": {"batch_per_step": 16, "micro_batch": 8},
        "data": {"train_images": 16 * PER_EPOCH, "validation_images": HELD_OUT},
        "evaluation": {"images": 20, "chunk": 100, "honesty_images": 2},
        "checkpoint": {"every_steps": 4},
    }
    sparsity = {"keep_fractions": ["0.1"], "baselines": ["snip"], "baseline_epochs": "finetune_epochs"}
    tuned = small_recipe(fashion_data, **sections, sparsity=sparsity | {"tune": TUNE})
    untuned = small_recipe(fashion_data, **sections, sparsity=sparsity)
    jobs, leases = [], []
    for name, recipe, crashes in (("straight", tuned, []), ("crashed", tuned, [*CRASHES]), ("untuned", untuned, [])):
        (root / name).mkdir()
        atomic_write_text(root / name / "recipe.yaml", dump_recipe(recipe))
        leases.append(Leases([root / name / stage.name for stage in stages_of(recipe)]))
        jobs.append((recipe, root / name, leases[-1].token, crashes))
    try:
        first, second = run_group(2, _all, jobs)
    finally:
        for lease in leases:
            lease.release()
    assert first == second
    return root, tuned, first


Runs = tuple[Path, Recipe, list[Any]]


def test_the_best_on_the_held_out_images_is_chosen(runs: Runs) -> None:
    """A rate that trains nothing loses. Accuracies are those of the exported network, which is the average."""
    root, recipe, _ = runs
    assert all(is_done(root / "straight", stage) for stage in stages_of(recipe))
    with Loader(recipe.data.train_file, image_size=28, threads=1) as loader:
        context = RunContext(recipe, root / "straight", "", Group(0, 1, torch.device("cpu")))
        _, ids = context.training_samples(loader)
        images = EvaluationImages(loader, recipe.data.augmentation, ids)
        assert recipe.threat_model is not None
        measure = Pgd(recipe.threat_model, 1, 2.5 * float(recipe.threat_model.eps), restarts=1, seed=recipe.seed)
        for name in LASTS:
            result = read_json(root / "straight" / name / "result.json")
            for trial in result["tuned"]:
                network = load_model(root / "straight" / trial["stage"] / "model.safetensors")
                robust = Evaluator(images, context.group).verdicts(network, measure, 100)["robust_correct"]
                assert trial["held_out_robust_accuracy"] == pytest.approx(robust.mean(), abs=1.5 / HELD_OUT)
            accuracies = [trial["held_out_robust_accuracy"] for trial in result["tuned"]]
            assert [trial["chosen"] for trial in result["tuned"]] == [
                n == accuracies.index(max(accuracies)) for n in (0, 1)
            ]
            assert len(set(accuracies)) == 2, "the choice is one"


def test_the_chosen_network_is_found_where_it_is_without_tuning(runs: Runs) -> None:
    root, *_ = runs
    for name, method in zip(LASTS, ("hydra", "snip"), strict=True):
        result = read_json(root / "straight" / name / "result.json")
        (chosen,) = [trial["stage"] for trial in result["tuned"] if trial["chosen"]]
        loaded = load_network(root / "straight", 0.1, method=method)
        assert loaded.file == root / "straight" / name / "model.safetensors"
        assert loaded.file.read_bytes() == (root / "straight" / chosen / "model.safetensors").read_bytes()
        assert loaded.evaluation is not None
        honesty = read_json(root / "straight" / name / "honesty.json")
        statuses = {check["name"]: check["verdict"] for check in honesty["checks"]}
        assert statuses["exported file"] == "pass", "compared with the trained network, from the copied checkpoint"


def test_a_trial_with_the_phases_own_rates_is_the_untuned_network(runs: Runs) -> None:
    """Bit for bit: attack noise and SNIP's scores are the method's, so that trials differ in their rates alone."""
    root, *_ = runs
    for name in ("prune", "finetune", "snip"):
        trial, plain = root / "straight" / "keep-0.1" / "trial-2" / name, root / "untuned" / "keep-0.1" / name
        one, other = (checkpoint.read_newest_checkpoint(folder) for folder in (trial, plain))
        assert one is not None
        assert other is not None
        assert one.progress == other.progress
        tensors, others = {**one.model, **one.train_state}, {**other.model, **other.train_state}
        assert tensors.keys() == others.keys()
        assert all(torch.equal(tensors[key], others[key]) for key in tensors)
        rows = [[{**row, "timing": None} for row in read_rows(folder / "metrics.jsonl")] for folder in (trial, plain)]
        assert rows[0] == rows[1]
    different = [root / "straight" / "keep-0.1" / f"trial-{number}" / "snip" / "result.json" for number in (1, 2)]
    masks = {read_json(path)["mask_sha256"] for path in different}
    assert len(masks) == 1


def test_crashed_in_trials_and_after_choosing_it_ends_bit_for_bit_the_same(runs: Runs) -> None:
    root, recipe, (straight, crashed, _) = runs
    assert [name for name, _ in straight] == [stage.name for stage in stages_of(recipe)[1:]]
    assert len(crashed) == len(straight), "no stage is finished twice"
    assert unlike(recipe, root / "straight", root / "crashed") == []


def test_the_test_set_is_not_even_opened_before_the_choice(runs: Runs) -> None:
    """Of a method; the one before it is evaluated by then. No trial is ever evaluated."""
    root, recipe, (straight, *_) = runs
    assert straight[4][0] == LASTS[0], "after two prune stages and two trials"
    assert [files for _, files in straight[:5]] == 5 * [["train.beton"]]
    trials = [stage.name for stage in stages_of(recipe) if stage.trial_of]
    assert len(trials) == 6
    assert not any((root / "straight" / name / "evaluate").exists() for name in trials)
    assert not any((root / "straight" / name / "honesty.json").exists() for name in trials)
