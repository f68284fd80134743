"""The report's wandb run: its chart, rows and tables hold the run's numbers, read back from the log."""

from __future__ import annotations

import json
import subprocess
import sys
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from launch.__main__ import main
from pipeline.report import wandb_report
from pipeline.report.examples import Examples, RunExamples
from pipeline.report.results import compare, read_runs
from pipeline.report.wandb_report import CHART, log_report
from tests.support.commands import ROOT
from tests.support.wandb_files import Recorded, recorded
from tests.unit.report.test_report import ACCURACY, LAYERS, save_evaluation, write_run
from tests.unit.training.test_stage_tracking import HOST, SECRET

pytestmark = pytest.mark.usefixtures("no_wandb_account")
METHODS = {"pretrain": "dense", "finetune": "HYDRA", "magnitude": "magnitude"}


def three_examples(run_folder: Path) -> RunExamples:
    """The first is not robust, the second is robust, and the third is unperturbed."""
    rng = np.random.default_rng(0)
    clean = rng.random((3, 3, 8, 8)).astype(np.float32) * 0.5 + 0.2
    moved = (clean + 0.1 * rng.choice([-1, 1], clean.shape)).astype(np.float32)
    moved[2] = clean[2]
    before, after, sure = np.array([1, 0, 2]), np.array([0, 0, 2]), np.full(3, 0.75, np.float32)
    examples = Examples(np.array([4, 8, 15]), np.array([1, 0, 2]), clean, moved, before, after, sure, sure)
    (run,) = read_runs([run_folder])
    return RunExamples(run.networks[-1], "PGD-20", ["bag", "boot", "coat"], examples)


@pytest.fixture
def finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    run = write_run(tmp_path / "demo", overrides=("tracking.wandb=offline", "tracking.wandb_project=mine"))
    listed = [{"name": "slope", "verdict": "pass", "figure": "0.1", "meaning": "falls"}]
    text = json.dumps({"model_sha256": "keep-0.1/finetune-0", "checks": listed})
    (run / "keep-0.1" / "finetune" / "honesty.json").write_text(text)
    monkeypatch.setattr(wandb_report, "examples_of", lambda _: three_examples(run))
    (run / "report").mkdir()
    (run / "report" / "report.html").write_text("<!doctype html><title>all of it</title>")
    return run


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("draw_accuracy", "draw_layers"):
        monkeypatch.setattr(f"pipeline.report.build.{name}", lambda *_: None)


def logged(run: Path) -> Recorded:
    (log,) = recorded(run / "report")
    return log


def accuracy_of(run: Path, stage: str, kind: str) -> dict[str, float]:
    return json.loads((run / stage / "evaluate" / "pgd.json").read_text())[f"{kind}_accuracy"]


def test_the_log_matches_the_run(finished: Path) -> None:
    log_report(finished, alone=True)
    log = logged(finished)
    assert (log.project, log.group, log.name, log.job_type) == (
        "mine",
        "demo",
        "demo",
        "report",
    )
    assert log.exit_code == 0
    assert log.config["name"] == "fashion_mnist"

    # rows: a line panel of robust_accuracy/HYDRA against sparsity, for any selection of runs
    assert log.axes["robust_accuracy/*"] == log.axes["clean_accuracy/*"] == "sparsity"
    rows = [row for row in log.rows if "sparsity" in row and CHART not in row]
    by_sparsity = {round(row["sparsity"], 6): row for row in rows if any("accuracy/" in key for key in row)}
    assert sorted(by_sparsity) == [0.0, 0.9, 0.99]
    expected_chart, expected_table = [], {}
    for stage in ACCURACY:
        folder, _, phase = stage.rpartition("/")
        keep = Decimal(folder.removeprefix("keep-") or 1)
        method, sparsity = METHODS[phase], float(1 - keep)
        row: list[float] = []
        for kind in ("clean", "robust"):
            accuracy = accuracy_of(finished, stage, kind)
            assert by_sparsity[sparsity][f"{kind}_accuracy/{method}"] == accuracy["value"]
            expected_chart.append((100 * sparsity, f"{method}, {kind}", 100 * accuracy["value"]))
            row += [accuracy["value"], accuracy["low"], accuracy["high"]]
        expected_table[method, sparsity] = row

    # the chart's data, and the mapping of its columns
    assert log.config["_wandb"]["visualize"][CHART]["panel_config"]["panelDefId"] == "wandb/lineseries/v0"
    chart = log.table(f"{CHART}_table")
    assert chart["columns"] == ["step", "lineKey", "lineVal"]
    drawn = sorted(map(tuple, chart["data"]))
    assert [point[:2] for point in drawn] == [point[:2] for point in sorted(expected_chart)]
    assert [point[2] for point in drawn] == pytest.approx([point[2] for point in sorted(expected_chart)])

    table = log.table("accuracies")
    columns = [f"{kind}_{part}" for kind in ("clean", "robust") for part in ("accuracy", "low", "high")]
    (run,) = read_runs([finished])
    assert len(table["data"]) == len(ACCURACY)
    for line in table["data"]:
        cells = dict(zip(table["columns"], line, strict=True))
        assert [cells[column] for column in columns] == expected_table[cells["method"], cells["sparsity"]]
        assert cells["keep_fraction"] == pytest.approx(1 - cells["sparsity"])
        if cells["method"] == "magnitude":
            test = compare(run, Decimal(str(cells["keep_fraction"])), "magnitude")
            assert test is not None
            assert (cells["hydra_lead"], cells["p"]) == (test.difference, test.p_value)
            assert cells["within_noise"] is (test.p_value >= 0.05)
        else:
            assert cells["hydra_lead"] is cells["p"] is cells["within_noise"] is None

    kept = log.table("kept_fractions")
    assert len(kept["data"]) == len(ACCURACY) * len(LAYERS)
    for line in kept["data"]:
        cells = dict(zip(kept["columns"], line, strict=True))
        assert cells["total"] == LAYERS[cells["layer"]]
        assert cells["kept_fraction"] == cells["kept"] / cells["total"]
        assert abs(cells["kept"] - cells["keep_fraction"] * cells["total"]) < 1
    checks = log.table("honesty_checks")
    assert [dict(zip(checks["columns"], line, strict=True))["verdict"] for line in checks["data"]] == ["pass"]
    (place,) = [row["report"]["path"] for row in log.rows if "report" in row]
    assert "all of it" in (log.folder / "files" / place).read_text()


def test_examples_are_pictures_with_captions(finished: Path) -> None:
    log_report(finished, alone=True)
    log, e = logged(finished), three_examples(finished).examples
    table = log.table("predictions")
    lines = [dict(zip(table["columns"], line, strict=True)) for line in table["data"]]
    assert [line["sample"] for line in lines] == [4, 8, 15]
    assert [line["verdict"] for line in lines] == ["not robust", "robust", "robust"]
    assert (lines[0]["true"], lines[0]["before"], lines[0]["after"]) == ("boot", "boot, 75 %", "bag, 75 %")
    assert [line["largest"] for line in lines] == ["25.5/255", "25.5/255", "0.0/255"]
    (logged_images,) = [row["adversarial_examples"] for row in log.rows if "adversarial_examples" in row]
    assert logged_images["captions"][0] == (
        "sample 4; true boot; before boot, 75 %; after bag, 75 %; verdict not robust; largest 25.5/255"
    )
    for i, place in enumerate(logged_images["filenames"]):
        pixels = np.asarray(Image.open(log.folder / "files" / place)).transpose(2, 0, 1).astype(float)
        image, perturbation, attacked = np.split(pixels, 3, axis=2)
        assert np.abs(image - 255 * e.clean[i]).max() <= 0.51
        assert np.abs(attacked - 255 * e.adversarial[i]).max() <= 0.51
        sign = np.sign(e.adversarial[i] - e.clean[i])
        assert np.array_equal(np.sign(np.where(perturbation == 128, 0, perturbation - 127.5)), sign)


def test_exported_files_are_an_artifact_that_their_card_describes(
    finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those without a card are not finished; a new card is a new run. Links are not followed."""
    made: list[tuple[str, list[str], str | None]] = []

    def produces(
        _: object, artifact: str, kind: str, files: list[Path], metadata: object, description: str | None = None
    ) -> None:
        if kind == "model":
            made.append((artifact, [path.name for path in files], description))

    monkeypatch.setattr(wandb_report.Mirror, "produces", produces)
    export = finished / "keep-0.1" / "finetune" / "export"
    export.mkdir()
    (export / "model.onnx").write_bytes(b"")
    (export / "README.md").write_text("# A card")
    (export / "secret").symlink_to(finished / "recipe.yaml")
    log_report(finished, alone=False)
    assert made == []
    for card in ("{}", "{ }", "{ }"):
        (export / "card.json").write_text(card)
        log_report(finished, alone=False)
    files = ["README.md", "card.json", "model.onnx"]
    assert made == 2 * [("demo-keep-0.1-finetune-export", files, "# A card")]


def test_a_changed_report_is_a_new_run(finished: Path) -> None:
    log_report(finished, alone=True)
    first = logged(finished)
    log_report(finished, alone=True)
    assert logged(finished).folder == first.folder
    path = finished / "pretrain" / "evaluate" / "pgd.json"
    save_evaluation(path, json.loads(path.read_text()), 1700, 500)
    log_report(finished, alone=True)
    second = logged(finished)
    assert second.run_id != first.run_id
    assert [row["robust_accuracy/dense"] for row in second.rows if "robust_accuracy/dense" in row] == [0.25]


def test_the_command_logs_the_report(finished: Path, no_pictures: None) -> None:
    assert main(["report", str(finished)]) == 0
    assert logged(finished).job_type == "report"


def test_the_page_is_logged_only_with_a_single_run(tmp_path: Path, no_pictures: None) -> None:
    """A page of two runs is in the first run's folder; the second run's page is out of date."""
    runs = [write_run(tmp_path / f"seed{seed}", seed, overrides=("tracking.wandb=offline",)) for seed in range(2)]
    (runs[1] / "report").mkdir()
    (runs[1] / "report" / "report.html").write_text("old")
    assert main(["report", *map(str, runs)]) == 0
    for run in runs:
        assert not [row for row in logged(run).rows if "report" in row]
    assert main(["report", str(runs[1])]) == 0
    with_page = logged(runs[1])
    (place,) = [row["report"]["path"] for row in with_page.rows if "report" in row]
    page = (runs[1] / "report" / "report.html").read_text()
    assert (with_page.folder / "files" / place).read_text() == page != "old"
    for reported in (runs[1:], runs, runs[1:]):  # unchanged
        assert main(["report", *map(str, reported)]) == 0
        assert logged(runs[1]).folder == with_page.folder


def test_an_unlogged_report_is_logged_later(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = finished / "recipe.yaml"
    log_report(finished, alone=True)
    first = logged(finished)
    recipe.write_text(recipe.read_text().replace("wandb: offline", "wandb: auto"))
    path = finished / "pretrain" / "evaluate" / "pgd.json"
    save_evaluation(path, json.loads(path.read_text()), 1700, 500)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    log_report(finished, alone=True)
    assert logged(finished).folder == first.folder
    monkeypatch.delenv("WANDB_MODE")
    log_report(finished, alone=True)
    assert logged(finished).folder == first.folder, "without a key, an offline run is made only where one is asked for"
    monkeypatch.setenv("WANDB_MODE", "dryrun")
    log_report(finished, alone=True)
    assert logged(finished).run_id != first.run_id


def test_private_settings_are_not_logged(tmp_path: Path, no_pictures: None) -> None:
    """With the real page, which is uploaded directly and in the report's artifact."""
    slurm = f"slurm={{setup: ['export WANDB_API_KEY={SECRET}'], nodes: 2, account: {SECRET}}}"
    run = write_run(tmp_path / "demo", overrides=("tracking.wandb=offline", slurm))
    assert SECRET in (run / "recipe.yaml").read_text()
    origin = {"command": ["launch", "run", f"--token={SECRET}"], "host": HOST, "commit": "c" * 40}
    (run / "provenance.json").write_text(json.dumps(origin))
    assert main(["report", str(run)]) == 0
    (place,) = [row["report"]["path"] for row in logged(run).rows if "report" in row]
    assert "c" * 40 in (logged(run).folder / "files" / place).read_text()
    data = b"".join(path.read_bytes() for path in (run / "report").rglob("*") if path.is_file())
    for text in (SECRET, HOST, "WANDB_API_KEY", "--token"):
        assert text.encode() not in data


def test_a_partial_and_an_empty_run(tmp_path: Path) -> None:
    half = write_run(tmp_path / "half", stages=["keep-0.1/finetune"], overrides=("tracking.wandb=offline",))
    log_report(half, alone=False)
    log = logged(half)
    assert [line[1] for line in log.table(f"{CHART}_table")["data"]] == ["HYDRA, clean", "HYDRA, robust"]
    assert len([row for row in log.rows if "robust_accuracy/HYDRA" in row]) == 1
    assert not [row for row in log.rows if "adversarial_examples" in row]  # the network's file is missing
    none = write_run(tmp_path / "none", stages=[], overrides=("tracking.wandb=offline",))
    off = write_run(tmp_path / "off", overrides=("tracking.wandb=disabled",))
    for run in (none, off):
        log_report(run, alone=False)
        assert not (run / "report").exists()


@pytest.mark.slow
def test_reporting_does_not_import_training() -> None:
    """DeepSpeed would print on standard output, next to the report's table."""
    heavy = ["ray", "deepspeed"]
    modules = "sys, pipeline.report.build, pipeline.report.wandb_report"
    code = f"import {modules}; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.stderr) == ("[]\n", "")
