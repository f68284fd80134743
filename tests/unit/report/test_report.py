"""Reports of synthetic runs: every number in table and CSV is recomputed here from the verdicts."""

from __future__ import annotations

import csv
import json
import math
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from matplotlib.colors import same_color
from matplotlib.container import ErrorbarContainer
from safetensors.torch import save_file

from launch.__main__ import main
from pipeline.evaluation.statistics import wilson_interval
from pipeline.models.pruning.topk import masks_sha256
from pipeline.recipe.file import dump_recipe, load_recipe, recipe_hash
from pipeline.report import wandb_report
from pipeline.report.build import build_report
from pipeline.report.charts import accuracy_figure
from pipeline.report.results import compare_all, read_runs
from pipeline.run.files import sha256_of

RECIPE = Path(__file__).parents[3] / "recipes" / "fashion_mnist.yaml"
IMAGES = 2000
LAYERS = {"conv1.weight": 432, "conv2.weight": 18432, "conv3.weight": 73728, "fc1.weight": 590000, "fc2.weight": 2560}
ACCURACY = {
    "pretrain": (0.866, 0.670),
    "keep-0.1/finetune": (0.858, 0.655),
    "keep-0.1/magnitude": (0.857, 0.651),
    "keep-0.01/finetune": (0.829, 0.622),
    "keep-0.01/magnitude": (0.776, 0.571),
}
OTHERS = {
    "keep-0.1/random": (0.852, 0.648),
    "keep-0.1/snip": (0.856, 0.652),
    "keep-0.01/random": (0.551, 0.412),
    "keep-0.01/snip": (0.775, 0.577),
}
"""Accuracies of two more baselines."""
STRUCTURED = {
    "keep-0.5/finetune": (0.865, 0.668),
    "keep-0.5/hydra-2of4/finetune": (0.861, 0.664),
    "keep-0.5/magnitude-1x4": (0.855, 0.650),
    "keep-0.1/magnitude-1x4": (0.845, 0.640),
}
"""And with structures."""


def evaluation(clean: np.ndarray, robust: np.ndarray, model: str) -> dict[str, Any]:
    settings = {"norm": "linf", "eps": "1/10", "steps": 20, "restarts": 1, "step_size": 0.025}
    facts: dict[str, Any] = {"attack": "pgd", "title": "PGD-20, linf eps 1/10", "settings": settings, "chunk": 250}
    facts |= {"images": len(clean), "model_sha256": model, "data_sha256": "d" * 64}
    for name, verdicts in (("clean", clean), ("robust", robust)):
        correct = int(verdicts.sum())
        low, high = wilson_interval(correct, len(verdicts))
        facts[f"{name}_correct"] = correct
        facts[f"{name}_accuracy"] = {"value": correct / len(verdicts), "low": low, "high": high}
    return facts


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip drawing, which takes a second or two, where only numbers are checked."""
    monkeypatch.setattr("pipeline.report.build.draw_accuracy", lambda *_: None)
    monkeypatch.setattr("pipeline.report.build.draw_layers", lambda run, path: None)


def write_run(
    folder: Path, seed: int = 0, stages: list[str] | None = None, measure: str = "pgd", overrides: tuple[str, ...] = ()
) -> Path:
    """A finished run, or one with only `stages` finished."""
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(dump_recipe(load_recipe(RECIPE, [f"seed={seed}", *overrides])))
    generator = np.random.default_rng(seed)
    hardness = generator.random(IMAGES)
    accuracy = ACCURACY | OTHERS | STRUCTURED
    for stage in ACCURACY if stages is None else stages:
        path = folder / stage
        (path / "evaluate").mkdir(parents=True)
        shift = generator.normal(0, 0.004)
        # Networks agree on most easy images, as in practice.
        clean, robust = (hardness + generator.normal(0, 0.1, IMAGES) < a + shift for a in accuracy[stage])
        robust &= clean
        model = f"{stage}-{seed}"
        facts = evaluation(clean, robust, model) | {"attack": measure}
        (path / "evaluate" / f"{measure}.json").write_text(json.dumps(facts))
        labels = np.arange(IMAGES) % 10
        columns = {"sample_id": np.arange(IMAGES), "label": labels, "clean_correct": clean, "robust_correct": robust}
        columns["clean_prediction"] = np.where(clean, labels, (labels + 1) % 10)
        if measure == "certified":
            columns["radius"] = np.where(clean, 0.5 * np.clip(1 - hardness, 0, 1), 0.0)
            columns["clean_prediction"] = np.zeros(IMAGES, np.int64)
        pq.write_table(pa.table(columns), path / "evaluate" / f"{measure}.parquet")
        keep = stage.split("/")[0].removeprefix("keep-") if "/" in stage else None
        kept = {name: total if keep is None else math.ceil(float(keep) * total) for name, total in LAYERS.items()}
        layers = [{"name": name, "kept": kept[name], "total": total} for name, total in LAYERS.items()]
        (path / "result.json").write_text(json.dumps({"stage": stage, "model_sha256": model, "layers": layers}))
    return folder


def save_evaluation(path: Path, facts: dict[str, Any], clean: int, robust: int, **columns: np.ndarray) -> None:
    """A further evaluation with its verdicts: the first images are correct."""
    images = facts["images"]
    first = {f"{name}_correct": np.arange(images) < count for name, count in (("clean", clean), ("robust", robust))}
    for name, count in (("clean", clean), ("robust", robust)):
        low, high = wilson_interval(count, images)
        facts = facts | {
            f"{name}_correct": count,
            f"{name}_accuracy": {"value": count / images, "low": low, "high": high},
        }
    path.write_text(json.dumps(facts))
    pq.write_table(pa.table({"sample_id": np.arange(images), **first, **columns}), path.with_suffix(".parquet"))


def edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def verdicts(run: Path, stage: str) -> np.ndarray:
    return pq.read_table(run / stage / "evaluate" / "pgd.parquet")["robust_correct"].to_numpy()


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


def png_size(path: Path) -> tuple[int, int]:
    header = path.read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", header[16:24])
    return width, height


def row_of(table: str, network: str, pruned: str) -> str:
    (row,) = [line for line in table.splitlines() if re.match(rf"{network}\s+{re.escape(pruned)} ", line)]
    return row


def test_one_run(tmp_path: Path) -> None:
    run = write_run(tmp_path / "demo")
    table = build_report([run])
    rows = {(r["network"], r["keep_fraction"]): r for r in read_csv(run / "report" / "robust_accuracy.csv")}
    assert list(rows) == [
        ("dense", "1"), ("HYDRA", "0.1"), ("magnitude", "0.1"), ("HYDRA", "0.01"), ("magnitude", "0.01")
    ]  # fmt: skip
    hydra, magnitude = verdicts(run, "keep-0.01/finetune"), verdicts(run, "keep-0.01/magnitude")
    row = rows["HYDRA", "0.01"]
    assert int(row["robust_correct"]) == hydra.sum()
    assert float(row["robust_accuracy_value"]) == hydra.mean()
    assert (float(row["robust_accuracy_low"]), float(row["robust_accuracy_high"])) == wilson_interval(
        int(hydra.sum()), IMAGES
    )
    assert row["mcnemar_p"] == ""
    row = rows["magnitude", "0.01"]
    assert float(row["hydra_lead"]) == pytest.approx(hydra.mean() - magnitude.mean())
    assert int(row["only_hydra_correct"]) == (hydra & ~magnitude).sum()
    assert int(row["only_this_correct"]) == (magnitude & ~hydra).sum()
    assert float(row["mcnemar_p"]) < 1e-3

    assert f"{100 * hydra.mean():.2f}" in row_of(table, "HYDRA", "99 %")
    line = row_of(table, "magnitude", "99 %")
    assert f"{100 * (hydra.mean() - magnitude.mean()):+.2f}" in line
    assert re.search(r"p = \d\.\de-\d\d$", line)
    assert re.match(r"dense +0 % ", row_of(table, "dense", "0 %"))
    assert "PGD-20, linf eps 1/10, 2,000 test images; seed 0" in table
    assert "missing" not in table

    layers = read_csv(run / "report" / "kept_fraction.csv")
    assert len(layers) == 5 * len(LAYERS)
    chosen = [r for r in layers if (r["network"], r["keep_fraction"], r["layer"]) == ("HYDRA", "0.01", "conv2.weight")]
    assert [(r["kept"], r["total"]) for r in chosen] == [("185", "18432")]
    for name in ("robust_accuracy.png", "kept_fraction.png"):
        width, height = png_size(run / "report" / name)
        assert width >= 1200
        assert height >= 300


@pytest.mark.parametrize("seeds", [1, 3])
def test_markers_within_noise_are_hollow(tmp_path: Path, seeds: int) -> None:
    runs = read_runs([write_run(tmp_path / str(seed), seed) for seed in range(seeds)])
    comparisons = compare_all(runs)
    near = {key for key, test in comparisons.items() if test is not None and test.p_value >= 0.05}
    assert 0 < len(near) < len(comparisons)
    figure = accuracy_figure(runs, comparisons)
    expected = {
        (100 * network.evaluation.robust_accuracy.value, (i, network.name, network.keep_fraction) in near)
        for i, run in enumerate(runs)
        for network in run.networks
        if network.name != "dense" and network.evaluation is not None
    }
    for axes, points in ((figure.axes[0], expected), (figure.axes[1], None)):
        marks = [container.lines[0] for container in axes.containers if isinstance(container, ErrorbarContainer)]
        hollow = {mark: same_color(mark.get_markerfacecolor(), "white") for mark in marks}
        drawn = {(float(value), hollow[mark]) for mark in marks for value in np.asarray(mark.get_ydata())}
        assert sum(len(np.asarray(mark.get_ydata())) for mark in marks) == 4 * seeds
        assert drawn == points if points is not None else not any(hollow for _, hollow in drawn)
    assert "hollow marker: within noise of HYDRA (McNemar's p of 0.05 or more)" in figure.get_suptitle()
    sure = dict.fromkeys(comparisons)
    assert "hollow" not in accuracy_figure(runs, sure).get_suptitle()


@pytest.mark.usefixtures("no_pictures")
def test_honesty_checks_are_one_line(tmp_path: Path) -> None:
    run = write_run(tmp_path / "demo")
    assert "honesty" not in build_report([run])
    for stage, names in (("pretrain", []), ("keep-0.1/finetune", ["slope"]), ("keep-0.01/finetune", ["slope", "mask"])):
        listed = [
            {"name": n, "verdict": "warn" if n in names else "pass", "figure": "", "meaning": ""}
            for n in ("slope", "gradient", "mask")
        ]
        text = json.dumps({"model_sha256": f"{stage}-0", "checks": listed})
        (run / stage / "honesty.json").write_text(text)
    warnings = "demo/keep-0.1/finetune warns of slope; demo/keep-0.01/finetune warns of slope, mask ("
    assert f"\nhonesty: 6 of 9 checks pass; {warnings}" in build_report([run])
    for stage in ("keep-0.1/finetune", "keep-0.01/finetune"):
        edit(run / stage / "honesty.json", lambda values: values.update(model_sha256="another"))
    assert build_report([run]).endswith("\nhonesty: 3 of 3 checks pass")


@pytest.mark.parametrize("seeds", [1, 3])
def test_every_baseline_is_shown_and_compared(tmp_path: Path, seeds: int) -> None:
    every = ("sparsity.baselines=[snip, random, magnitude]",)
    runs = [write_run(tmp_path / f"{seed}", seed, [*ACCURACY, *OTHERS], overrides=every) for seed in range(seeds)]
    table = build_report(runs)
    assert "missing" not in table
    names = ["dense", *("HYDRA", "SNIP", "random", "magnitude") * 2]
    assert [line.split()[0] for line in table.splitlines()[1:10]] == names
    rows = read_csv(runs[0] / "report" / "robust_accuracy.csv")
    assert [row["network"] for row in rows] == names * seeds
    for row in rows:
        stage = {"SNIP": "snip"}.get(row["network"], row["network"])
        if stage in ("dense", "HYDRA"):
            assert row["hydra_lead"] == row["mcnemar_p"] == ""
            continue
        run, keep = runs[int(row["seed"])], f"keep-{row['keep_fraction']}"
        lead = verdicts(run, f"{keep}/finetune").mean() - verdicts(run, f"{keep}/{stage}").mean()
        assert float(row["hydra_lead"]) == pytest.approx(lead)
        assert f"{100 * lead:+.2f}" in row_of(table, row["network"], f"{row['pruned_percent']} %")
    assert {r["network"] for r in read_csv(runs[0] / "report" / "kept_fraction.csv")} == set(names)
    assert png_size(runs[0] / "report" / "robust_accuracy.png")[0] >= 1200


@pytest.mark.usefixtures("no_pictures")
def test_seeds_make_one_table_with_means_and_every_difference(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / f"seed{seed}", seed) for seed in range(3)]
    table = build_report(runs)
    hydra = [verdicts(run, "keep-0.01/finetune").mean() for run in runs]
    magnitude = [verdicts(run, "keep-0.01/magnitude").mean() for run in runs]
    line = row_of(table, "HYDRA", "99 %")
    assert f" {100 * np.mean(hydra):.2f} " in line
    assert f"[{100 * min(hydra):.2f}, {100 * max(hydra):.2f}]" in line
    line = row_of(table, "magnitude", "99 %")
    differences = [f"{100 * (h - m):+.2f}" for h, m in zip(hydra, magnitude, strict=True)]
    assert re.findall(r"[+-]\d+\.\d\d(?=  p )", line) == differences
    assert "means over seeds 0, 1, 2" in table
    assert len(read_csv(runs[0] / "report" / "robust_accuracy.csv")) == 15
    assert not (runs[1] / "report").exists()


def test_unevaluated_networks_are_missing(tmp_path: Path) -> None:
    run = write_run(tmp_path / "half", stages=["pretrain", "keep-0.1/finetune"])
    (run / "keep-0.1" / "prune").mkdir()
    table = build_report([run])
    assert row_of(table, "magnitude", "90 %").split()[-1] == "missing"
    assert f"{100 * verdicts(run, 'keep-0.1/finetune').mean():.2f}" in row_of(table, "HYDRA", "90 %")
    assert row_of(table, "HYDRA", "99 %").count("missing") == 2
    assert row_of(table, "magnitude", "99 %").count("missing") == 3
    rows = read_csv(run / "report" / "robust_accuracy.csv")
    assert [r["robust_correct"] == "" for r in rows] == [False, False, True, True, True]


@pytest.mark.usefixtures("no_pictures")
def test_a_missing_seed_is_counted(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / "a", 0), write_run(tmp_path / "b", 1, stages=["pretrain"])]
    assert "(1 of 2)" in row_of(build_report(runs), "HYDRA", "99 %")


def test_a_run_that_has_just_started(tmp_path: Path) -> None:
    run = write_run(tmp_path / "new", stages=[])
    assert "nothing is evaluated yet" in build_report([run])
    assert png_size(run / "report" / "robust_accuracy.png")[0] >= 1200
    assert png_size(run / "report" / "kept_fraction.png")[0] >= 1200
    assert (run / "report" / "kept_fraction.csv").read_text().count("\n") == 1


def test_structures_are_reported_where_they_have_a_network(tmp_path: Path) -> None:
    """2:4 has none at a keep_fraction of 0.1, which is no gap."""
    baselines = 'sparsity.baselines=[{name: hydra, structure: "2:4"}, {name: magnitude, structure: 1x4}]'
    overrides = ("sparsity.keep_fractions=[0.5, 0.1]", baselines)
    stages = ["pretrain", "keep-0.1/finetune", *STRUCTURED]
    run = write_run(tmp_path / "structures", stages=stages, overrides=overrides)
    table = build_report([run])
    rows = [(row["network"], row["keep_fraction"]) for row in read_csv(run / "report" / "robust_accuracy.csv")]
    half = ["HYDRA", "HYDRA (2:4)", "magnitude (1x4)"]
    assert rows == [("dense", "1"), *((name, "0.5") for name in half), *((name, "0.1") for name in half[::2])]
    assert "missing" not in table
    lead = verdicts(run, "keep-0.5/finetune").mean() - verdicts(run, "keep-0.5/hydra-2of4/finetune").mean()
    assert f"{100 * lead:+.2f}" in row_of(table, re.escape("HYDRA (2:4)"), "50 %")
    page = (run / "report" / "report.html").read_text(encoding="utf-8")
    assert "HYDRA (2:4)" in page
    assert "mark hydra-2-4" in page


@pytest.mark.usefixtures("no_pictures")
def test_a_recipe_without_baselines_has_no_leads(tmp_path: Path) -> None:
    run = write_run(tmp_path / "alone", stages=["pretrain", "keep-0.1/finetune", "keep-0.01/finetune"])
    recipe = load_recipe(RECIPE, ["sparsity.baselines=[]"])
    (run / "recipe.yaml").write_text(dump_recipe(recipe))
    table = build_report([run])
    assert "missing" not in table
    assert "lead" not in table


def test_a_folder_that_is_not_a_run(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"{tmp_path} is not a run .*recipe\.yaml.*give a run's name"):
        build_report([tmp_path])


def test_other_attacks_recipes_seeds_images_and_models_are_not_mixed(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a")
    again = write_run(tmp_path / "b")
    with pytest.raises(ValueError, match="give each seed once"):
        build_report([run, again])

    (again / "recipe.yaml").write_text(dump_recipe(load_recipe(RECIPE, ["seed=1", "phases.prune.epochs=9"])))
    with pytest.raises(ValueError, match="different recipes"):
        build_report([run, again])

    evaluated = again / "keep-0.1" / "magnitude" / "evaluate" / "pgd.json"
    edit(evaluated, lambda values: values["settings"].update(steps=50))
    with pytest.raises(ValueError, match=r"evaluated differently: steps is 20 and 50"):
        build_report([again])

    edit(evaluated, lambda values: values.update(steps=20, model_sha256="stale"))
    with pytest.raises(ValueError, match="of another model"):
        build_report([again])

    other = run / "keep-0.1" / "magnitude" / "evaluate" / "pgd.parquet"
    ids = pa.array(np.arange(IMAGES)[::-1].copy())
    pq.write_table(pq.read_table(other).set_column(0, "sample_id", ids), other)
    with pytest.raises(ValueError, match="different images"):
        build_report([run])


def test_certified_accuracy_is_not_called_robust(tmp_path: Path) -> None:
    smoothed = ("objective={name: noise, sigma: 1/4}", "threat_model={norm: l2, eps: 1/4}", "evaluation.attacks=[]")
    run = write_run(tmp_path / "smoothed", measure="certified", overrides=smoothed)
    text = build_report([run])
    assert "certified %" in text
    assert "points of certified accuracy" in text
    assert "robust" not in text
    rows = read_csv(run / "report" / "certified_accuracy.csv")
    assert {(row["network"], row["keep_fraction"]) for row in rows} == {
        ("dense", "1"), ("HYDRA", "0.1"), ("magnitude", "0.1"), ("HYDRA", "0.01"), ("magnitude", "0.01")
    }  # fmt: skip
    columns = pq.read_table(run / "keep-0.01" / "finetune" / "evaluate" / "certified.parquet").to_pydict()
    for row in [row for row in rows if (row["network"], row["keep_fraction"]) == ("HYDRA", "0.01")]:
        pairs = zip(columns["clean_correct"], columns["radius"], strict=True)
        count = sum(correct and radius > float(row["radius"]) for correct, radius in pairs)
        assert float(row["certified_accuracy_value"]) == count / IMAGES
        bounds = (float(row["certified_accuracy_low"]), float(row["certified_accuracy_high"]))
        assert bounds == wilson_interval(count, IMAGES)
    width, height = png_size(run / "report" / "certified_accuracy.png")
    assert width > height > 500
    plain = write_run(tmp_path / "plain")
    assert "robust %" in build_report([plain])


def test_further_attacks_have_a_separate_table(tmp_path: Path, no_pictures: None) -> None:
    run = write_run(tmp_path / "demo")
    plain = build_report([run])
    assert not (run / "report" / "further_attacks.csv").exists()
    folder = run / "keep-0.01" / "finetune" / "evaluate"
    own = json.loads((folder / "pgd.json").read_text())
    square = own | {"attack": "square", "title": "Square attack, linf eps 1/10", "images": 200}
    square["flags"] = {"randomised": 200, "dynamic": 0, "other": 100}
    flags = {f"flag_{flag}": np.arange(200) < images for flag, images in square["flags"].items()}
    save_evaluation(folder / "square-0123abcd.json", square, 166, 131, **flags)
    apgd = square | {"title": "APGD", "attack": "apgd", "flags": {"other": 0}}
    save_evaluation(folder / "apgd.json", apgd, 166, 131, flag_other=np.zeros(200, bool))
    (folder / "stale.json").write_text((folder / "apgd.json").read_text().replace(own["model_sha256"], "before"))
    (folder / "torn.json").write_text(json.dumps(square)[:40])
    edited = square | {"title": "Edited", "flags": None}
    save_evaluation(folder / "edited.json", edited, 166, 131)
    edit(
        folder / "edited.json",
        lambda facts: facts.update(robust_correct=198, robust_accuracy=dict.fromkeys(("value", "low", "high"), 0.99)),
    )
    (folder / "progress.json").write_text(json.dumps({"attack": "apgd", "done": 1, "total": 2}))
    text = build_report([run])
    assert text.startswith(plain)
    header, apgd, black_box, changed, torn = text.removeprefix(plain).strip().splitlines()
    assert re.split(r"  +", header)[::8] == ["attack", "warnings"]
    assert re.fullmatch(r"APGD +200 +0 +HYDRA +99 % +\d\d\.\d\d +65\.50 +\[58\.68, 71\.74\]", apgd)
    assert black_box.startswith("Square attack, linf eps 1/10")
    assert black_box.endswith("65.50  [58.68, 71.74]  randomised other")
    assert re.match(r"edited +0 +HYDRA +99 % +missing +missing +", changed)
    assert (
        f"{folder}/edited.json is damaged: its robust_correct is 198, and its verdicts give 131; delete it" in changed
    )
    assert re.match(r"torn +0 +HYDRA +99 % +missing +missing +", torn)
    assert f"{folder}/torn.json cannot be read: " in torn
    rows = read_csv(run / "report" / "further_attacks.csv")
    assert [(r["attack"], r["keep_fraction"], r["images"], r["robust_correct"], r["flags"]) for r in rows] == [
        ("apgd", "0.01", "200", "131", ""),
        ("square", "0.01", "200", "131", "randomised other"),
        ("", "0.01", "", "", ""),
        ("", "0.01", "", "", ""),
    ]
    assert [bool(row["missing"]) for row in rows] == [False, False, True, True]


def test_corruptions_have_a_mean_per_severity(tmp_path: Path, no_pictures: None) -> None:
    run = write_run(tmp_path / "demo")
    plain, folder = build_report([run]), run / "keep-0.01" / "finetune" / "evaluate"
    facts = json.loads((folder / "pgd.json").read_text())
    facts |= {"attack": "corruptions", "title": "all of 18 corruptions at severities 1 to 5, constants of ImageNet-C"}
    earlier = facts | {"title": "all of 8 corruptions", "mean_corruption_accuracy": 0.7}  # without values per severity
    save_evaluation(folder / "corruptions-1.json", earlier, 1700, 1204)
    accuracy = [0.81, 0.7, 0.6, 0.5, 0.4]
    facts |= {
        "corruption_accuracy": {"blur": accuracy},
        "severity_accuracy": accuracy,
        "mean_corruption_accuracy": 0.602,
    }
    columns = {f"right_blur_{i + 1}": np.arange(IMAGES) < share * IMAGES for i, share in enumerate(accuracy)}
    save_evaluation(folder / "corruptions.json", facts, 1700, 1204, **columns)
    _, table = build_report([run]).removeprefix(plain).strip().split("\n\n")
    header, row = table.splitlines()
    assert re.split(r"  +", header)[5:] == ["severity 1", "severity 2", "severity 3", "severity 4", "severity 5", "all"]
    assert re.split(r"  +", row) == [
        *("constants of ImageNet-C", "2,000", "0", "HYDRA", "99 %"),
        *("81.00", "70.00", "60.00", "50.00", "40.00", "60.20"),
    ]
    first, second = read_csv(run / "report" / "further_attacks.csv")
    assert (first["severity_1_accuracy"], first["severity_5_accuracy"]) == ("0.81", "0.4")
    assert (first["mean_corruption_accuracy"], second["severity_1_accuracy"]) == ("0.602", "")


def test_honesty_warnings_of_another_attack_are_shown(tmp_path: Path, no_pictures: None) -> None:
    run = write_run(tmp_path / "demo")
    plain, folder = build_report([run]), run / "keep-0.01" / "finetune" / "evaluate"
    facts = json.loads((folder / "pgd.json").read_text()) | {"title": "APGD", "attack": "apgd", "flags": {"other": 1}}
    checks = [{"name": name, "verdict": name[:4], "figure": ""} for name in ("warning", "passing", "warned")]
    facts |= {"honesty": {"images": 100, "checks": checks}}
    save_evaluation(folder / "apgd.json", facts, 1700, 1204, flag_other=np.arange(IMAGES) < 1)
    (folder / "honesty.json").write_text(json.dumps(facts | {"attack": "honesty", "checks": checks}))
    _, row = build_report([run]).removeprefix(plain).strip().splitlines()
    assert row.endswith("  other; honesty: warning, warned")
    (row,) = read_csv(run / "report" / "further_attacks.csv")
    assert (row["flags"], row["honesty_warnings"]) == ("other", "warning, warned")


def test_runs_that_cannot_be_written(
    tmp_path: Path,
    no_pictures: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    mine, theirs = write_run(tmp_path / "mine"), write_run(tmp_path / "theirs", seed=1)
    (theirs / "report").touch()  # a file in the way, which stops even root
    shown: list[Path] = []

    def show(folder: Path, *, alone: bool) -> None:
        (folder / "report").mkdir(exist_ok=True)
        shown.append(folder)

    monkeypatch.setattr(wandb_report, "log_report", show)
    assert main(["report", str(mine), str(theirs)]) == 0
    out, _ = capsys.readouterr()
    assert "means over seeds 0, 1" in out
    assert shown == [mine]
    (warning,) = caplog.messages
    assert warning.startswith(f"the report of {theirs} is not in wandb: ")

    assert main(["report", str(theirs), str(mine)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(rf"error: the report cannot be written: .*{theirs}/report.*; .* one of your own first\n", err)


def refused(run: Path, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        build_report([run])


@pytest.mark.usefixtures("no_pictures")
def test_numbers_that_are_not_the_verdicts_are_refused(tmp_path: Path) -> None:
    """An accuracy of 99.00 that somebody typed is never printed."""
    run = write_run(tmp_path / "demo")
    path = run / "keep-0.1" / "finetune" / "evaluate" / "pgd.json"
    original, parquet = path.read_text(), path.with_suffix(".parquet").read_bytes()
    edit(path, lambda facts: facts["robust_accuracy"].update(value=0.99))
    refused(run, f"{path} is damaged: .*robust_accuracy is not that of .* of 2000 images; delete it and evaluate again")
    edit(path, lambda facts: facts.update(robust_correct=1980, robust_accuracy={"value": 0.99, "low": 0.98, "high": 1}))
    refused(run, f"{path} is damaged: its robust_correct is 1980, and its verdicts give ")
    path.write_text(original.replace('"value": ', '"value": NaN, "was": ', 1))
    refused(run, f"{path} cannot be read: it has the number NaN")
    path.write_text(original)
    edit(path, lambda facts: facts.update(attack="../../../../elsewhere/pgd"))
    refused(run, f"{path} is damaged: attack: String should match pattern")
    edit(path, lambda facts: facts.update(attack="square"))
    refused(run, f"{path} is damaged: its attack is square, not pgd; delete it and resume the run")
    path.write_text(original)
    path.with_suffix(".parquet").write_bytes(parquet[: len(parquet) // 2])
    refused(run, r"pgd\.parquet (is damaged|cannot be read): .*; delete it with its \.json and evaluate again")
    verdicts = pq.read_table(pa.BufferReader(parquet))
    pq.write_table(verdicts.slice(0, 1000), path.with_suffix(".parquet"))
    refused(run, f"{path} is damaged: its images is 2000, and its verdicts give 1000")
    pq.write_table(verdicts.drop_columns(["robust_correct"]), path.with_suffix(".parquet"))
    refused(run, r"pgd\.parquet is damaged: it has no usable column robust_correct")
    path.with_suffix(".parquet").unlink()
    refused(run, r"pgd\.parquet, the verdicts of an evaluation, does not exist; delete it with its \.json")
    path.with_suffix(".parquet").write_bytes(parquet)
    build_report([run])


@pytest.mark.usefixtures("no_pictures")
def test_a_network_that_is_not_the_stages_is_refused(tmp_path: Path) -> None:
    run = write_run(tmp_path / "demo")
    stage = run / "keep-0.1" / "finetune"
    tensors = {name: torch.zeros(total) for name, total in LAYERS.items()}
    for name, total in LAYERS.items():
        tensors[name][: math.ceil(0.1 * total)] = 1.0
    save_file(tensors, stage / "model.safetensors")
    refused(run, f"{stage}/model.safetensors is not the network that the stage exported")
    facts = {"model_sha256": sha256_of(stage / "model.safetensors")}
    edit(stage / "evaluate" / "pgd.json", lambda values: values.update(facts))
    facts["mask_sha256"] = masks_sha256({name: tensor != 0 for name, tensor in tensors.items()})
    edit(stage / "result.json", lambda values: values.update(facts))
    build_report([run])
    for kept in (1, 20_000):
        edit(stage / "result.json", lambda values, kept=kept: values["layers"][2].update(kept=kept))
        reason = f"it says that conv3.weight keeps {kept:,} of 73,728 connections, and model.safetensors has 7,373 of"
        refused(run, f"{stage}/result.json is damaged: {reason}")
    edit(stage / "result.json", lambda values: values["layers"].pop())
    edit(stage / "result.json", lambda values: values["layers"][2].update(kept=7_373))
    refused(run, f"{run}/pretrain/result.json and {stage}/result.json list different layers, so one of them is damaged")
    edit(stage / "result.json", lambda values: values["layers"][2].update(kept=80_000))
    refused(run, f"{stage}/result.json is damaged: layers.2: Value error, 80000 of 73728 connections cannot be kept")


@pytest.mark.usefixtures("no_pictures")
def test_a_copy_under_another_seed_is_named(tmp_path: Path) -> None:
    first = write_run(tmp_path / "first")
    copy = Path(shutil.copytree(first, tmp_path / "copy"))
    (copy / "recipe.yaml").write_text(dump_recipe(load_recipe(RECIPE, ["seed=1"])))
    with pytest.raises(
        ValueError, match=f"{first}/pretrain and {copy}/pretrain have the same network, so one is a copy"
    ):
        build_report([first, copy])
    facts = {"recipe_sha256": recipe_hash(load_recipe(RECIPE))}
    (copy / "provenance.json").write_text(json.dumps(facts))
    refused(copy, f"{copy}/recipe.yaml was edited after the run was started.*restore it, or start a run")


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("name", ["report.html", "robust_accuracy.csv", "kept_fraction.csv"])
def test_a_report_is_not_written_through_links(tmp_path: Path, name: str) -> None:
    run, outside = write_run(tmp_path / "demo"), tmp_path / "outside"
    outside.write_text("mine")
    (run / "report").mkdir()
    (run / "report" / name).symlink_to(outside)
    build_report([run])
    assert outside.read_text() == "mine"
    assert not (run / "report" / name).is_symlink()


@pytest.mark.usefixtures("no_pictures", "no_wandb_account")
@pytest.mark.parametrize("name", ["report", "report/wandb"])
def test_a_reports_folders_are_not_links(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    run, outside = write_run(tmp_path / "demo", overrides=("tracking.wandb=offline",)), tmp_path / "outside"
    outside.mkdir()
    (run / name).parent.mkdir(exist_ok=True)
    (run / name).symlink_to(outside)
    assert main(["report", str(run)]) == (2 if name == "report" else 0)  # wandb's errors stop nothing
    assert f"{run / name} is a link, and what is written there would leave" in capsys.readouterr().err + caplog.text
    assert not list(outside.iterdir())
