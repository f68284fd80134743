"""Accuracy per class, confusion matrices, the majority class: recounted here from the verdicts."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray

from pipeline.report.build import PAGE, build_report
from pipeline.report.charts import accuracy_chart, accuracy_figure, certified_charts
from pipeline.report.history import read_history
from pipeline.report.per_class import read_class_results
from pipeline.report.results import certified_curves, compare_all, read_runs
from pipeline.report.run_charts import training_charts
from tests.unit.report.test_page import Page, write_history
from tests.unit.report.test_report import ACCURACY, IMAGES, edit, evaluation, read_csv, write_run


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.report.build.draw_accuracy", lambda *_: None)
    monkeypatch.setattr("pipeline.report.build.draw_layers", lambda *_: None)


def write_classes(run: Path, stage: str, labels: NDArray[np.int64], predictions: NDArray[np.int64]) -> None:
    """Replace a network's verdicts; every third correct image is robust."""
    clean = labels == predictions
    robust = clean & (np.arange(len(labels)) % 3 == 0)
    columns = {"sample_id": np.arange(len(labels)), "label": labels, "clean_prediction": predictions}
    columns |= {"clean_correct": clean, "robust_correct": robust}
    folder = run / stage / "evaluate"
    pq.write_table(pa.table(columns), folder / "pgd.parquet")
    model = json.loads((run / stage / "result.json").read_text())["model_sha256"]
    (folder / "pgd.json").write_text(json.dumps(evaluation(clean, robust, model)))


def skewed_run(folder: Path) -> Path:
    """Class 7 is 30 % of the images. The sparsest HYDRA network always answers it, the others are right for 80 %."""
    rng = np.random.default_rng(5)
    run = write_run(folder)
    labels = np.where(rng.random(IMAGES) < 0.22, 7, rng.integers(0, 10, IMAGES))
    for stage in ACCURACY:
        right = rng.random(IMAGES) < 0.8
        predictions = np.where(right, labels, rng.integers(0, 10, IMAGES))
        write_classes(run, stage, labels, np.full(IMAGES, 7) if stage == "keep-0.01/finetune" else predictions)
    return run


def columns_of(run: Path, stage: str) -> dict[str, NDArray]:
    table = pq.read_table(run / stage / "evaluate" / "pgd.parquet")
    return {name: table[name].to_numpy() for name in table.column_names}


@pytest.mark.usefixtures("no_pictures")
def test_accuracy_per_class_is_in_the_csv_and_on_the_page(tmp_path: Path) -> None:
    run = skewed_run(tmp_path / "demo")
    build_report([run])
    rows = read_csv(run / "report" / "per_class_accuracy.csv")
    assert len(rows) == 5 * 10
    page = Page((run / "report" / PAGE).read_text(encoding="utf-8"))
    for stage, network, keep in (("pretrain", "dense", "1"), ("keep-0.1/magnitude", "magnitude", "0.1")):
        verdicts = columns_of(run, stage)
        for label in range(10):
            of_class = verdicts["label"] == label
            counts = [of_class.sum(), *((of_class & verdicts[f"{k}_correct"]).sum() for k in ("clean", "robust"))]
            (row,) = [r for r in rows if (r["network"], r["keep_fraction"], r["label"]) == (network, keep, str(label))]
            assert [int(row[key]) for key in ("images", "clean_correct", "robust_correct")] == counts
            assert float(row["robust_accuracy"]) == counts[2] / counts[0]
            assert row["class"] == f"class {label}", "the test file's manifest is not on this machine"
            cells = [f"{100 * count / counts[0]:.1f}" for count in counts[1:]]
            assert [f"class {label}", *cells] in [r[:3] for r in page.rows]
    assert "HYDRA, 99 % pruned lowest: class 0, 0.0 % robust" in page.text


@pytest.mark.usefixtures("no_pictures")
def test_confusions_are_in_the_csv_and_on_the_page(tmp_path: Path) -> None:
    run = skewed_run(tmp_path / "demo")
    build_report([run])
    verdicts = columns_of(run, "pretrain")
    counts = np.zeros((10, 10), int)
    np.add.at(counts, (verdicts["label"], verdicts["clean_prediction"]), 1)
    read = np.zeros((10, 10), int)
    for row in read_csv(run / "report" / "confusion.csv"):
        if row["network"] == "dense":
            read[int(row["true_class"].split()[1]), int(row["predicted_class"].split()[1])] += int(row["images"])
    assert (read == counts).all()
    page = Page((run / "report" / PAGE).read_text(encoding="utf-8"))
    shares = [f"{100 * count / counts[3].sum():.0f}" if count else "" for count in counts[3]]
    assert ["class 3", *shares] in page.rows
    assert ["class 3", *("100" if label == 7 else "" for label in range(10))] in page.rows, "the constant network"


@pytest.mark.usefixtures("no_pictures")
def test_a_network_that_is_no_better_than_a_constant_is_warned_of(tmp_path: Path) -> None:
    run = skewed_run(tmp_path / "demo")
    share = np.bincount(columns_of(run, "pretrain")["label"]).max() / IMAGES
    table = build_report([run])
    assert f"majority class: always answering 'class 7' is right for {100 * share:.2f} % of the images" in table
    warnings = [line for line in table.splitlines() if line.startswith("warning: ")]
    clean = f"warning: HYDRA, 99 % pruned: clean accuracy {100 * share:.2f} % and robust accuracy"
    assert [line.startswith(clean) for line in warnings if "99 % pruned: clean" in line] == [True]
    assert not any("clean accuracy" in line for line in warnings if "HYDRA, 99 %" not in line)
    assert any(line.startswith("warning: dense: robust accuracy") for line in warnings), "a third of 80 % is below"
    page = Page((run / "report" / PAGE).read_text(encoding="utf-8"))
    assert f"not above the {100 * share:.2f} % of always answering 'class 7'" in page.text
    useful = write_run(tmp_path / "useful")
    assert "warning" not in build_report([useful])
    assert "constant answer" not in Page((useful / "report" / PAGE).read_text(encoding="utf-8")).text


def test_every_plot_of_accuracies_has_the_majority_line(tmp_path: Path) -> None:
    run = skewed_run(tmp_path / "demo")
    write_history(run)
    runs = read_runs([run])
    majority = read_class_results(runs).majority
    assert majority is not None
    share = 100 * majority.share
    comparisons = compare_all(runs)
    charts = [accuracy_chart(runs, comparisons, kind, majority) for kind in ("clean", "robust")]
    training = training_charts(runs[0], read_history(runs[0]), runs[0].recipe.sparsity.keep_fractions[0], majority)
    charts += [chart for chart in training if "accuracy" in chart.title]
    smoothed = ("objective={name: noise, sigma: 1/4}", "threat_model={norm: l2, eps: 1/4}", "evaluation.attacks=[]")
    certified = read_runs([write_run(tmp_path / "smoothed", measure="certified", overrides=smoothed)])
    tenth = read_class_results(certified).majority
    assert tenth is not None
    assert tenth.share == 0.1
    charts += certified_charts(certified, certified_curves(certified), majority)
    assert len(charts) == 2 + 2 + 2
    for chart in charts:
        svg = chart.svg()
        assert svg.count('class="line majority"') == 1, chart.title
        assert f"majority class {share:.1f}" in svg
    for axes in accuracy_figure(runs, comparisons, majority).axes:
        assert [line for line in axes.lines if list(np.asarray(line.get_ydata())) == [share, share]]
        low, high = axes.get_ylim()
        assert 0 <= low < share < high


@pytest.mark.usefixtures("no_pictures")
def test_classes_are_named_by_the_manifest_of_the_evaluated_file(tmp_path: Path, fashion_data: Path) -> None:
    run = write_run(tmp_path / "demo", overrides=(f"data.test_file={fashion_data / 'test.beton'}",))
    manifest = json.loads((fashion_data / "test.beton.manifest.json").read_text())
    assert read_class_results(read_runs([run])).class_names[0] == "class 0", "that is another file"
    for stage in ACCURACY:
        edit(run / stage / "evaluate" / "pgd.json", lambda values: values.update(data_sha256=manifest["sha256"]))
    assert read_class_results(read_runs([run])).class_names == manifest["class_names"]


@pytest.mark.usefixtures("no_pictures")
def test_many_classes_are_those_that_are_worst(tmp_path: Path) -> None:
    run = write_run(tmp_path / "demo", overrides=("model.num_classes=100",))
    rng = np.random.default_rng(0)
    labels = np.arange(IMAGES) % 100
    for stage in ACCURACY:
        write_classes(run, stage, labels, np.where(rng.random(IMAGES) < labels / 100, labels, (labels + 1) % 100))
    build_report([run])
    page = Page((run / "report" / PAGE).read_text(encoding="utf-8"))
    assert len([row for row in page.rows if row and row[0].startswith("class ")]) == 5 * 25
    assert "75 more are in per_class_accuracy.csv" in page.text
    assert len(read_csv(run / "report" / "per_class_accuracy.csv")) == 5 * 100


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize(("column", "value"), [("label", -1), ("label", 10), ("clean_prediction", 10)])
def test_verdicts_of_unknown_classes_are_refused(tmp_path: Path, column: str, value: int) -> None:
    run = write_run(tmp_path / "demo")
    path = run / "pretrain" / "evaluate" / "pgd.parquet"
    verdicts = columns_of(run, "pretrain")
    verdicts[column] = verdicts[column].copy()
    verdicts[column][17] = value
    pq.write_table(pa.table(verdicts), path)
    with pytest.raises(ValueError, match=f"{path} has class {value}, but the recipe has 10 classes; delete it"):
        build_report([run])
