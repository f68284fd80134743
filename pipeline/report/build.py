"""Builds the report of one or several runs: a text table, CSV files, charts, and an HTML page with all results.

Robust and clean accuracy per sparsity of HYDRA, the baselines and the dense network, with 95 % Wilson intervals;
McNemar's exact test per baseline and sparsity; kept connections per layer.
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from pipeline.evaluation.result import KINDS, Accuracy
from pipeline.evaluation.statistics import McNemar
from pipeline.report.benchmark_chart import draw_accuracy_against_cost
from pipeline.report.charts import draw_accuracy, draw_certified
from pipeline.report.comparison import NOISE, within_noise
from pipeline.report.extra_evaluations import corruption_table, extra_rows, extra_table
from pipeline.report.page import write_page
from pipeline.report.per_class import (
    ClassResults,
    confusion_rows,
    per_class_rows,
    read_class_results,
    useless_networks,
)
from pipeline.report.results import (
    CertifiedCurves,
    Comparisons,
    RunResult,
    attack_text,
    certified_curves,
    claim,
    compare_all,
    honesty_text,
    p_text,
    read_runs,
)
from pipeline.report.run_charts import draw_layers
from pipeline.report.size_and_speed import size_and_speed_rows, size_and_speed_table
from pipeline.report.text_table import text_table
from pipeline.report.tuning import count_passes, tuning_columns, tuning_lines
from pipeline.run.files import make_folder, replacing
from pipeline.run.layout import RunFolder

PAGE = "report.html"
LAYER_COLUMNS = ("run", "seed", "network", "keep_fraction", "layer", "kept", "total", "kept_fraction")


def build_report(run_folders: list[Path]) -> str:
    """Write report.html, robust_accuracy.{png,csv}, kept_fraction.{png,csv}, per_class_accuracy.csv and confusion.csv
    into the first run's report/; return the table. Runs evaluated by certificates also have
    certified_accuracy.{png,csv}.

    Where `launch benchmark` has measured networks, their sizes and speeds have a table and deployment.{png,csv}.
    Evaluations by further attacks have a separate table and further_attacks.csv; corruptions add another table.

    Several runs are seeds of one recipe: accuracies are means, differences and p-values are per seed. Networks that are
    not evaluated yet are shown as missing. Errors: ValueError, see `results.read_runs`.
    """
    runs = read_runs(run_folders)
    comparisons = compare_all(runs)
    folder = RunFolder(runs[0].folder).report
    make_folder(folder)
    accuracies = _accuracy_rows(runs, comparisons)
    _write_csv(folder / "robust_accuracy.csv", tuple(accuracies[0]), accuracies)
    _write_csv(folder / "kept_fraction.csv", LAYER_COLUMNS, _layer_rows(runs))
    classes = read_class_results(runs)
    for name, rows in (("per_class_accuracy.csv", per_class_rows(classes)), ("confusion.csv", confusion_rows(classes))):
        if rows:
            _write_csv(folder / name, tuple(rows[0]), rows)
    draw_accuracy(runs, comparisons, folder / "robust_accuracy.png", classes.majority)
    draw_layers(runs[0], folder / "kept_fraction.png")
    curves = certified_curves(runs)
    if curves:
        rows = _curve_rows(runs, curves)
        _write_csv(folder / "certified_accuracy.csv", tuple(rows[0]), rows)
        draw_certified(runs, curves, folder / "certified_accuracy.png", classes.majority)
    further = extra_rows(runs)
    if further:
        _write_csv(folder / "further_attacks.csv", tuple(further[0]), further)
    sizes = size_and_speed_rows(runs)
    if sizes:
        _write_csv(folder / "deployment.csv", tuple(sizes[0]), sizes)
        draw_accuracy_against_cost(runs, folder / "deployment.png")
    write_page(runs, comparisons, curves, classes, folder / PAGE)
    tables = [results_table(runs, comparisons, classes), size_and_speed_table(runs)]
    tables += [extra_table(further), corruption_table(further)]
    return "\n\n".join(filter(None, tables))


def results_table(runs: list[RunResult], comparisons: Comparisons, classes: ClassResults) -> str:
    """Format the results as text: accuracies in percent, differences in percentage points; then notes and warnings."""
    single = len(runs) == 1
    seeds = [run.recipe.seed for run in runs]
    bounds = "95 % interval" if single else "[lowest, highest]"
    header = ["network", "pruned", "clean %", bounds, f"{claim(runs)} %", bounds]
    if comparisons:
        header += ["HYDRA's lead", "p"] if single else [f"HYDRA's lead, seed {seed}" for seed in seeds]
    rows = [header]
    for network in runs[0].networks:
        per_run = [run.find(network.name, network.keep_fraction) for run in runs]
        row = [network.name, network.pruned]
        for kind in KINDS:
            row += _accuracy_cells([n.evaluation.accuracy(kind) for n in per_run if n and n.evaluation], len(runs))
        if network.name in runs[0].baselines:
            for i in range(len(runs)):
                points, p = _difference_cells(comparisons[i, network.name, network.keep_fraction])
                row += [points, p] if single else [f"{points}  {p}".rstrip()]
        rows.append(row + [""] * (len(header) - len(row)))
    seed_note = f"seed {seeds[0]}" if single else f"means over seeds {', '.join(map(str, seeds))}"
    notes = [f"{attack_text(runs)}; {seed_note}"]
    if comparisons:
        gain = f"percentage points of {claim(runs)} accuracy over the network in that row"
        notes.append(f"HYDRA's lead: {gain}; p: McNemar's exact two-sided test")
    notes += tuning_lines(runs)
    if classes.majority is not None:
        name, share = classes.majority.name, classes.majority.share
        notes.append(f"majority class: always answering {name!r} is right for {100 * share:.2f} % of the images")
    if honesty := honesty_text(runs):
        notes.append(honesty)
    notes += [f"warning: {warning}" for warning in useless_networks(runs, classes.majority)]
    return "\n".join([text_table(rows, left=["network"]), *notes])


def _accuracy_cells(accuracies: list[Accuracy], expected: int) -> list[str]:
    """(value, bounds) of one network: accuracy and interval, or mean and range over seeds."""
    if not accuracies:
        return ["missing", ""]
    values = [100 * accuracy.value for accuracy in accuracies]
    if expected == 1:
        return [f"{values[0]:.2f}", f"[{100 * accuracies[0].low:.2f}, {100 * accuracies[0].high:.2f}]"]
    present = "" if len(values) == expected else f" ({len(values)} of {expected})"
    return [f"{sum(values) / len(values):.2f}{present}", f"[{min(values):.2f}, {max(values):.2f}]"]


def _difference_cells(test: McNemar | None) -> tuple[str, str]:
    if test is None:
        return "missing", ""
    noise = f", {NOISE}" if within_noise(test) else ""
    return f"{100 * test.difference:+.2f}", f"{p_text(test.p_value)}{noise}"


def _accuracy_rows(runs: list[RunResult], comparisons: Comparisons) -> list[dict[str, Any]]:
    rows = []
    for i, run in enumerate(runs):
        passes = count_passes(run)
        for network in run.networks:
            row: dict[str, Any] = {
                "run": run.folder.name,
                "seed": run.recipe.seed,
                "network": network.name,
                "keep_fraction": network.keep_fraction,
                "pruned_percent": network.pruned.removesuffix(" %"),
            }
            evaluation = network.evaluation
            row |= {key: getattr(evaluation, key, None) for key in ("attack", "title", "images")}
            row |= {key: evaluation.settings.get(key) if evaluation else None for key in ("norm", "eps")}
            for kind in KINDS:
                row[f"{kind}_correct"] = evaluation.correct(kind) if evaluation else None
                accuracy = evaluation.accuracy(kind) if evaluation else None
                for part in ("value", "low", "high"):
                    row[f"{kind}_accuracy_{part}"] = getattr(accuracy, part, None)
            test = comparisons.get((i, network.name, network.keep_fraction))
            row["hydra_lead"] = test.difference if test else None
            row["only_hydra_correct"] = test.only_first if test else None
            row["only_this_correct"] = test.only_second if test else None
            row["mcnemar_p"] = test.p_value if test else None
            rows.append(row | tuning_columns(network, passes))
    return rows


def _curve_rows(runs: list[RunResult], curves: CertifiedCurves) -> list[dict[str, Any]]:
    return [
        {
            "run": runs[i].folder.name,
            "seed": runs[i].recipe.seed,
            "network": name,
            "keep_fraction": keep,
            **{"radius" if key == "radius" else f"certified_accuracy_{key}": value for key, value in point.items()},
        }
        for (i, name, keep), points in curves.items()
        for point in points
    ]


def _layer_rows(runs: list[RunResult]) -> list[dict[str, Any]]:
    return [
        {
            "run": run.folder.name,
            "seed": run.recipe.seed,
            "network": network.name,
            "keep_fraction": network.keep_fraction,
            "layer": layer.name,
            "kept": layer.kept,
            "total": layer.total,
            "kept_fraction": layer.kept / layer.total,
        }
        for run in runs
        for network in run.networks
        for layer in network.layers
    ]


def _write_csv(path: Path, columns: tuple[str, ...], rows: list[dict[str, Any]]) -> None:
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, fieldnames=columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
