"""Reports say how each method was tuned, and how many passes over the training images each took."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.recipe.file import load_recipe
from pipeline.recipe.stages import stages_of
from pipeline.report.build import build_report
from pipeline.report.history import read_history, without_rejected_trials
from pipeline.report.results import read_runs
from pipeline.report.tuning import tuning_lines
from pipeline.report.wandb_report import report_tables
from tests.unit.report.test_page import page_of, write_history
from tests.unit.report.test_report import edit, no_pictures, read_csv, write_run

__all__ = ["no_pictures"]
PHASES = ("phases.pretrain.epochs=5", "phases.prune.epochs=2", "phases.finetune.epochs=3", "phases.finetune.lr=0.02")
TUNE = "sparsity.tune={finetune_lr: [0.01, 0.03, 0.1], prune_lr: [0.1, 0.1, 0.05]}"
PASSES = 4
"""PGD of three steps, and the update."""


def tuned_run(folder: Path, seed: int = 0, chosen: int = 2) -> Path:
    """With all trials; trial `chosen` of HYDRA, and of magnitude the first, at both sparsities."""
    write_run(folder, seed, overrides=(*PHASES, TUNE))
    write_history(folder)
    for stage in stages_of(load_recipe(folder / "recipe.yaml")):
        best = chosen if stage.phase == "finetune" else 1
        tuned: list[dict[str, Any]] = [
            {
                "stage": trial.stage,
                "finetune_lr": trial.finetune_lr,
                **({} if trial.prune_lr is None else {"prune_lr": trial.prune_lr}),
                "held_out_robust_accuracy": 0.25 * (1 + (number == best)),
                "chosen": number == best,
            }
            for number, trial in enumerate(stage.trials, 1)
        ]
        if tuned:
            edit(folder / stage.name / "result.json", lambda values, tuned=tuned: values.update(tuned=tuned))
    return folder


@pytest.mark.usefixtures("no_pictures")
def test_without_tuning_one_line_says_so(tmp_path: Path) -> None:
    run = write_run(tmp_path / "demo", overrides=PHASES)
    rates = "not tuned: finetune lr 0.02, prune lr 0.1"
    assert f"\n{rates}\n" in build_report([run])
    write_history(run)
    line = f"{rates}; passes over the training images: {10 * PASSES} each"
    assert f"\n{line}\n" in build_report([run])
    assert f"N{line[1:]}." in page_of([run]).text
    other = write_run(tmp_path / "other", overrides=(*PHASES, "sparsity.baseline_epochs=finetune_epochs"))
    write_history(other)
    lines = tuning_lines(read_runs([other]))
    assert lines == [f"{rates}; passes over the training images: HYDRA {10 * PASSES}, magnitude {8 * PASSES}"]
    rows = read_csv(run / "report" / "robust_accuracy.csv")
    assert [float(row["passes"]) for row in rows] == [5 * PASSES, *(4 * [10 * PASSES])]
    assert {row["trials"] for row in rows} == {row["chosen_finetune_lr"] for row in rows} == {""}


@pytest.mark.usefixtures("no_pictures")
def test_each_network_says_how_it_was_chosen_and_what_it_took(tmp_path: Path) -> None:
    """HYDRA's trials share prune stages: two of two epochs, three of three; magnitude has three of five."""
    run = tuned_run(tmp_path / "demo")
    text, page = build_report([run]), page_of([run])
    hydra = "3 trials; finetune lr 0.03, prune lr 0.1 chosen on 2,000 held-out images"
    magnitude = "3 trials; finetune lr 0.01 chosen on 2,000 held-out images"
    images = load_recipe(run / "recipe.yaml").data.validation_images
    hydra, magnitude = (line.replace("2,000", f"{images:,}") for line in (hydra, magnitude))
    counts = (5 + 2 * 2 + 3 * 3, 5 + 3 * 5)
    for share in ("90 %", "99 %"):
        for name, line, count in (("HYDRA", hydra, counts[0]), ("magnitude", magnitude, counts[1])):
            whole = f"{name}, {share} pruned: {line}; {10 * PASSES} passes, {count * PASSES} with all trials"
            assert f"\n{whole}\n" in text
            assert whole in page.text
    assert "not tuned" not in text
    columns = ("trials", "chosen_finetune_lr", "chosen_prune_lr", "chosen_held_out_robust_accuracy")
    columns += ("passes", "passes_with_all_trials")
    rows = {row["network"]: [row[key] for key in columns] for row in read_csv(run / "report" / "robust_accuracy.csv")}
    assert rows == {
        "dense": ["", "", "", "", "20.0", "20.0"],
        "HYDRA": ["3", "0.03", "0.1", "0.5", "40.0", f"{counts[0] * PASSES}.0"],
        "magnitude": ["3", "0.01", "", "0.5", "40.0", f"{counts[1] * PASSES}.0"],
    }
    table = report_tables(read_runs([run])[0])["accuracies"]
    assert [row["chosen_finetune_lr"] for row in table] == [None, 0.03, 0.01, 0.03, 0.01]


def test_seeds_that_chose_otherwise_are_named(tmp_path: Path) -> None:
    runs = [tuned_run(tmp_path / f"seed{seed}", seed, chosen) for seed, chosen in ((0, 2), (1, 3))]
    first, second, *_ = tuning_lines(read_runs(runs))
    assert "3 trials; seed 0: finetune lr 0.03, prune lr 0.1, seed 1: finetune lr 0.1, prune lr 0.05 chosen" in first
    assert "3 trials; finetune lr 0.01 chosen" in second


@pytest.mark.usefixtures("no_pictures")
def test_curves_are_of_the_chosen_trial_and_costs_of_all(tmp_path: Path) -> None:
    folder = tuned_run(tmp_path / "demo", chosen=3)
    (run,) = read_runs([folder])
    shown = [history.stage.name for history in without_rejected_trials(read_history(run))]
    parts = ("trial-3/prune", "finetune", "magnitude")
    assert shown == ["pretrain", *(f"keep-{keep}/{part}" for keep in ("0.1", "0.01") for part in parts)]
    page = page_of([folder])
    trained = [stage.name for stage in stages_of(run.recipe) if not stage.trials]
    assert [row[0] for row in page.rows if len(row) == 9] == ["Stage", *trained, "Total"]
    parents = {row[0]: row[1] for row in page.rows if len(row) == 5 and row[0].startswith("keep-")}
    assert parents["keep-0.01/finetune"] == "keep-0.01/trial-3/finetune"
    result = folder / "keep-0.1" / "finetune" / "result.json"
    values = json.loads(result.read_text())
    values.pop("tuned")
    result.write_text(json.dumps(values))
    (run,) = read_runs([folder])
    unsettled = [history.stage.name for history in without_rejected_trials(read_history(run))]
    assert {f"keep-0.1/trial-{n}/{part}" for n, part in ((1, "prune"), (2, "finetune"), (3, "prune"))} <= {*unsettled}
