"""The report of a run as one small wandb run: what a project's view begins with, robust accuracy per sparsity.

Its group is the run's name, like that of the run's stages, and its job type is "report". wandb cannot take back what a
run has logged, so a report that says something new is a new wandb run, and one that does not is none.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.evaluation.result import KINDS
from pipeline.report.build import PAGE
from pipeline.report.comparison import within_noise
from pipeline.report.examples import Shown, examples_of
from pipeline.report.extra_evaluations import extra_rows
from pipeline.report.pictures import amplified, answers, pixels_of
from pipeline.report.results import NetworkResult, RunResult, compare_all, honesty_checks, read_runs
from pipeline.run.files import atomic_write_text
from pipeline.run.layout import RunFolder
from pipeline.run.provenance import config_of
from pipeline.run.tracking.wandb_ids import forget_run
from pipeline.run.tracking.wandb_mirror import Label, Mirror

if TYPE_CHECKING:
    import wandb

AXES = {f"{kind}_accuracy/*": "sparsity" for kind in KINDS}
CHART = "accuracy_per_sparsity"
Rows = list[dict[str, Any]]


def log_report(run_folder: Path, alone: bool) -> None:
    """Log the report of one run, where its recipe has wandb and something is evaluated.

    `alone`: what `report` wrote into the run's folder is of this run only, and goes with it. What wandb cannot do is a
    warning. Errors: ValueError, see `results.read_runs`.
    """
    (run,) = read_runs([run_folder])
    tracking = run.recipe.tracking
    if tracking.wandb == "disabled" or not any(network.evaluation for network in run.networks):
        return
    folder, name = RunFolder(run_folder).report, run_folder.name
    folder.mkdir(exist_ok=True)
    rows, tables, said, page = rows_of(run), tables_of(run), folder / "wandb" / "said", folder / PAGE
    numbers, paged = _digest(json.dumps([rows, tables])), _digest(page.read_text(encoding="utf-8")) if alone else ""
    known = said.read_text(encoding="utf-8").splitlines() if said.exists() else []
    if known[:1] == [numbers] and paged in ("", *known[1:]):
        return
    earlier = set((folder / "wandb").glob("offline-run-*"))
    config, shown = config_of(run.recipe, run_folder), examples_of(run)
    forget_run(folder)
    label = Label(folder, tracking.wandb_project, name, name, "report", config, AXES)
    mirror = Mirror(label, tracking.wandb)
    for row in rows:
        mirror.do("accuracies", lambda logged, row=row: logged.log(row))
    mirror.do("the chart and the tables", lambda logged: _log_tables(logged, run, tables))
    if isinstance(shown, Shown):
        mirror.do("the examples", lambda logged: _log_examples(logged, shown))
    if alone:
        mirror.do("the page", lambda logged: _log_page(logged, page))
        mirror.produces(f"{name}-report", "report", sorted(path for path in folder.iterdir() if path.is_file()), {})
    if mirror.finish():
        atomic_write_text(said, f"{numbers}\n{paged}\n")
        for path in earlier:
            shutil.rmtree(path, ignore_errors=True)


def rows_of(run: RunResult) -> Rows:
    """One row per sparsity, from the dense network on: sparsity, and 'robust_accuracy/HYDRA' and so on."""
    rows: dict[float, dict[str, Any]] = {}
    for network in run.networks:
        row = rows.setdefault(_sparsity(network), {"sparsity": _sparsity(network)})
        if network.evaluation is not None:
            values = {kind: network.evaluation.accuracy(kind).value for kind in KINDS}
            row |= {f"{kind}_accuracy/{network.name}": value for kind, value in values.items()}
    return [rows[sparsity] for sparsity in sorted(rows) if len(rows[sparsity]) > 1]


def tables_of(run: RunResult) -> dict[str, Rows]:
    """Title -> rows: accuracies with their 95 % Wilson intervals and HYDRA's lead, kept connections per layer, honesty
    checks, further attacks. Shares are fractions."""
    comparisons = compare_all([run])
    tables: dict[str, Rows] = {"accuracies": [], "kept_fractions": [], "honesty_checks": []}
    for network in run.networks:
        of = {"method": network.name, "sparsity": _sparsity(network), "keep_fraction": float(network.keep_fraction)}
        if network.evaluation is not None:
            row = of | {"images": network.evaluation.images, "title": network.evaluation.title}
            for kind in KINDS:
                accuracy = network.evaluation.accuracy(kind)
                row |= {f"{kind}_accuracy": accuracy.value, f"{kind}_low": accuracy.low, f"{kind}_high": accuracy.high}
            test = comparisons.get((0, network.name, network.keep_fraction))
            lead: dict[str, Any] = dict.fromkeys(("hydra_lead", "p", "within_noise"))
            if test is not None:
                lead = {"hydra_lead": test.difference, "p": test.p_value, "within_noise": within_noise(test)}
            tables["accuracies"].append(row | lead)
        for layer in network.layers:
            counts = {key: layer[key] for key in ("kept", "total")}
            share = {"kept_fraction": layer["kept"] / layer["total"]}
            tables["kept_fractions"].append(of | {"layer": layer["name"]} | counts | share)
        for check in honesty_checks(network):
            tables["honesty_checks"].append(of | check)
    further = [{**row, "keep_fraction": float(row["keep_fraction"])} for row in extra_rows([run])]
    return {title: rows for title, rows in {**tables, "further_attacks": further}.items() if rows}


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _sparsity(network: NetworkResult) -> float:
    return float(1 - network.keep_fraction)


def _log_tables(logged: wandb.Run, run: RunResult, tables: Mapping[str, Rows]) -> None:
    import wandb

    lines: dict[str, list[tuple[float, float]]] = {}
    for network in run.networks:
        if network.evaluation is not None:
            for kind in KINDS:
                point = 100 * _sparsity(network), 100 * network.evaluation.accuracy(kind).value
                lines.setdefault(f"{network.name}, {kind}", []).append(point)
    xs, ys = ([[point[axis] for point in sorted(points)] for points in lines.values()] for axis in (0, 1))
    title = "Clean and robust accuracy, %, per sparsity"
    chart = wandb.plot.line_series(xs, ys, list(lines), title, "connections pruned, %")
    made = {
        name: wandb.Table(columns=list(rows[0]), data=[list(row.values()) for row in rows])
        for name, rows in tables.items()
    }
    logged.log({CHART: chart, **made})


def _log_examples(logged: wandb.Run, shown: Shown) -> None:
    """One picture per example, image, perturbation and attacked image side by side. Not in a table: offline wandb
    writes tables without their pictures."""
    import wandb

    e, pictures, rows = shown.examples, [], []
    for i in range(len(e.ids)):
        difference, largest = amplified(e.clean[i], e.adversarial[i])
        said = {"sample": int(e.ids[i]), **answers(shown, i), "largest": f"{255 * largest:.1f}/255"}
        side_by_side = np.concatenate(
            [pixels_of(image) for image in (e.clean[i], difference, e.adversarial[i])], axis=1
        )
        pictures.append(wandb.Image(side_by_side, caption="; ".join(f"{key} {value}" for key, value in said.items())))
        rows.append(list(said.values()))
    columns: list[str | int] = ["sample", "true", "before", "after", "verdict", "largest"]
    logged.log({"adversarial_examples": pictures, "predictions": wandb.Table(columns=columns, data=rows)})


def _log_page(logged: wandb.Run, page: Path) -> None:
    import wandb

    logged.log({"report": wandb.Html(page.read_text(encoding="utf-8"), inject=False)})
