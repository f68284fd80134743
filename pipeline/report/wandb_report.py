"""The report of a run as one small wandb run, with robust accuracy per sparsity for the project's overview.

Its group is the run's name, as for the run's stages, and its job type is "report". Logged data cannot be replaced in
wandb, so a changed report becomes a new wandb run, and an unchanged one is not logged.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.evaluation.result import KINDS
from pipeline.report.build import PAGE
from pipeline.report.comparison import within_noise
from pipeline.report.examples import RunExamples, examples_of
from pipeline.report.extra_evaluations import extra_rows
from pipeline.report.pictures import amplified, captions, pixels_of
from pipeline.report.results import NetworkResult, RunResult, budget_unit, compare_all, honesty_checks, read_runs
from pipeline.report.size_and_speed import size_and_speed_rows
from pipeline.report.tuning import count_passes, tuning_columns
from pipeline.run.files import atomic_write_text, make_folder, read_whole, sha256_of
from pipeline.run.layout import CARD, MODEL_CARD, RunFolder, StageFolder
from pipeline.run.provenance import config_of
from pipeline.run.tracking.wandb_ids import artifact_of, forget_run
from pipeline.run.tracking.wandb_mirror import Label, Mirror, choose_mode
from pipeline.run.tracking.wandb_mode import asked_mode

if TYPE_CHECKING:
    import wandb

AXES = {f"{kind}_accuracy/*": "sparsity" for kind in KINDS}
CHART = "accuracy_per_sparsity"
Rows = list[dict[str, Any]]


def log_report(run_folder: Path, alone: bool) -> None:
    """Log the report of one run, if its recipe enables wandb and a network is evaluated.

    `alone`: the files of `report` in the run's folder cover this run only, and are uploaded too. Failures of wandb are
    warnings. Errors: ValueError, see `results.read_runs`.
    """
    (run,) = read_runs([run_folder])
    tracking = run.recipe.tracking
    if tracking.wandb == "disabled" or not any(network.evaluation for network in run.networks):
        return
    if tracking.wandb == "auto" and asked_mode(os.environ, Path.cwd()) is None and choose_mode() == "offline":
        return  # no account, and nobody asked for an offline run
    folder, name = RunFolder(run_folder).report, run_folder.name
    make_folder(folder)
    rows, tables, digest_file, page = accuracy_rows(run), report_tables(run), folder / "wandb" / "said", folder / PAGE
    exports = _exports(run)
    numbers = _digest(json.dumps([rows, tables, *(sha256_of(folder / CARD) for folder in exports.values())]))
    page_digest = _digest(page.read_text(encoding="utf-8")) if alone else ""
    last_digests = read_whole(digest_file).decode(errors="replace").splitlines() if digest_file.exists() else []
    if last_digests[:1] == [numbers] and page_digest in ("", *last_digests[1:]):
        return
    old_folders = set((folder / "wandb").glob("offline-run-*"))
    config, run_examples = config_of(run.recipe, run_folder), examples_of(run)
    forget_run(folder)
    label = Label(folder, tracking.wandb_project, name, name, "report", config, AXES)
    mirror = Mirror(label, tracking.wandb)
    for row in rows:
        mirror.do("accuracies", lambda wandb_run, row=row: wandb_run.log(row))
    mirror.do("the chart and the tables", lambda wandb_run: _log_tables(wandb_run, run, tables))
    if isinstance(run_examples, RunExamples):
        mirror.do("the examples", lambda wandb_run: _log_examples(wandb_run, run_examples))
    if alone:
        mirror.do("the page", lambda wandb_run: _log_page(wandb_run, page))
        mirror.produces(f"{name}-report", "report", sorted(path for path in folder.iterdir() if path.is_file()), {})
    for stage, exported in exports.items():
        files = sorted(path for path in exported.iterdir() if path.is_file() and not path.is_symlink())
        text = read_whole(exported / MODEL_CARD).decode(errors="replace")
        mirror.produces(f"{artifact_of(run_folder, stage)}-export", "model", files, {}, text)
    if mirror.finish():
        atomic_write_text(digest_file, f"{numbers}\n{page_digest}\n")
        for path in old_folders:
            shutil.rmtree(path, ignore_errors=True)


def _exports(run: RunResult) -> dict[str, Path]:
    """Stage -> folder of its network's exported files, where `launch export` has written them with their cards."""
    folders = {network.stage: StageFolder(network.folder).export for network in run.networks}
    return {
        stage: folder for stage, folder in folders.items() if all((folder / n).is_file() for n in (CARD, MODEL_CARD))
    }


def accuracy_rows(run: RunResult) -> Rows:
    """One row per sparsity, the dense network first, with keys 'sparsity', 'robust_accuracy/HYDRA' and so on."""
    rows: dict[float, dict[str, Any]] = {}
    for network in run.networks:
        row = rows.setdefault(_sparsity(network), {"sparsity": _sparsity(network)})
        if network.evaluation is not None:
            values = {kind: network.evaluation.accuracy(kind).value for kind in KINDS}
            row |= {f"{kind}_accuracy/{network.name}": value for kind, value in values.items()}
    return [rows[sparsity] for sparsity in sorted(rows) if len(rows[sparsity]) > 1]


def report_tables(run: RunResult) -> dict[str, Rows]:
    """Title -> rows: accuracies with their 95 % Wilson intervals and HYDRA's lead, kept connections per layer, honesty
    checks, sizes and speeds, further attacks. Accuracies and kept shares are fractions."""
    comparisons, passes = compare_all([run]), count_passes(run)
    tables: dict[str, Rows] = {"accuracies": [], "kept_fractions": [], "honesty_checks": []}
    for network in run.networks:
        labels = {"method": network.name, "sparsity": _sparsity(network), "keep_fraction": float(network.keep_fraction)}
        if network.evaluation is not None:
            row = labels | {"images": network.evaluation.images, "title": network.evaluation.title}
            for kind in KINDS:
                accuracy = network.evaluation.accuracy(kind)
                row |= {f"{kind}_accuracy": accuracy.value, f"{kind}_low": accuracy.low, f"{kind}_high": accuracy.high}
            test = comparisons.get((0, network.name, network.keep_fraction))
            lead: dict[str, Any] = dict.fromkeys(("hydra_lead", "p", "within_noise"))
            if test is not None:
                lead = {"hydra_lead": test.difference, "p": test.p_value, "within_noise": within_noise(test)}
            tables["accuracies"].append(row | lead | tuning_columns(network, passes))
        for layer in network.layers:
            counts = {"kept": layer.kept, "total": layer.total, "kept_fraction": layer.kept / layer.total}
            tables["kept_fractions"].append(labels | {"layer": layer.name} | counts)
        for check in honesty_checks(network):
            tables["honesty_checks"].append(labels | check)
    further = [{**row, "keep_fraction": float(row["keep_fraction"])} for row in extra_rows([run])]
    sizes = [{**row, "keep_fraction": float(row["keep_fraction"])} for row in size_and_speed_rows([run])]
    return {title: rows for title, rows in {**tables, "deployment": sizes, "further_attacks": further}.items() if rows}


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _sparsity(network: NetworkResult) -> float:
    return float(1 - network.keep_fraction)


def _log_tables(wandb_run: wandb.Run, run: RunResult, tables: Mapping[str, Rows]) -> None:
    import wandb

    lines: dict[str, list[tuple[float, float]]] = {}
    for network in run.networks:
        if network.evaluation is not None:
            for kind in KINDS:
                point = 100 * _sparsity(network), 100 * network.evaluation.accuracy(kind).value
                lines.setdefault(f"{network.name}, {kind}", []).append(point)
    xs, ys = ([[point[axis] for point in sorted(points)] for points in lines.values()] for axis in (0, 1))
    title = "Clean and robust accuracy, %, per sparsity"
    chart = wandb.plot.line_series(xs, ys, list(lines), title, f"{budget_unit([run])} pruned, %")
    wandb_tables = {
        name: wandb.Table(columns=list(rows[0]), data=[list(row.values()) for row in rows])
        for name, rows in tables.items()
    }
    wandb_run.log({CHART: chart, **wandb_tables})


def _log_examples(wandb_run: wandb.Run, run_examples: RunExamples) -> None:
    """One picture per example: image, perturbation and adversarial image side by side. Not in a table, because offline
    wandb drops pictures in tables."""
    import wandb

    e, pictures, rows = run_examples.examples, [], []
    for i in range(len(e.ids)):
        difference, largest = amplified(e.clean[i], e.adversarial[i])
        caption = {"sample": int(e.ids[i]), **captions(run_examples, i), "largest": f"{255 * largest:.1f}/255"}
        side_by_side = np.concatenate(
            [pixels_of(image) for image in (e.clean[i], difference, e.adversarial[i])], axis=1
        )
        pictures.append(
            wandb.Image(side_by_side, caption="; ".join(f"{key} {value}" for key, value in caption.items()))
        )
        rows.append(list(caption.values()))
    columns: list[str | int] = ["sample", "true", "before", "after", "verdict", "largest"]
    wandb_run.log({"adversarial_examples": pictures, "predictions": wandb.Table(columns=columns, data=rows)})


def _log_page(wandb_run: wandb.Run, page: Path) -> None:
    import wandb

    wandb_run.log({"report": wandb.Html(page.read_text(encoding="utf-8"), inject=False)})
