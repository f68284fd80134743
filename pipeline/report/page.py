"""The report as one self-contained HTML page: no requests, no scripts, all charts inline.

Names of runs, classes and layers are untrusted: the template escapes every value (jinja2 autoescape). Only the charts,
whose text the XML writer escapes, and the style sheet are inserted unescaped. The page's content security policy
forbids scripts and requests.
"""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from pipeline.evaluation.result import KINDS
from pipeline.recipe.file import dump_yaml
from pipeline.recipe.stages import DENSE
from pipeline.recipe.technique import Attacking
from pipeline.report.benchmark_chart import accuracy_against_cost
from pipeline.report.chart_style import legend_key, method_colours
from pipeline.report.charts import accuracy_chart, certified_charts, difference_chart
from pipeline.report.class_tables import class_tables
from pipeline.report.comparison import SIGNIFICANT, differences, headline, signed
from pipeline.report.examples import RunExamples, examples_of
from pipeline.report.history import History, StageCost, read_history, stage_cost, without_rejected_trials
from pipeline.report.per_class import ClassResults, MajorityClass, useless_networks
from pipeline.report.pictures import example_cards
from pipeline.report.results import (
    CertifiedCurves,
    Comparisons,
    NetworkResult,
    RunResult,
    accuracies,
    attack_text,
    claim,
    honesty_checks,
    p_text,
    pruned_text,
)
from pipeline.report.run_charts import layer_chart, training_charts
from pipeline.report.size_and_speed import NOTE, size_and_speed_cells
from pipeline.report.tuning import tuning_lines
from pipeline.run.files import atomic_write_text
from pipeline.run.printable import printable
from pipeline.run.provenance import public_provenance, public_recipe
from pipeline.run.records import KeptCount
from pipeline.run.tracking.metrics import PARTS

TEMPLATE_FOLDER = Path(__file__).parent / "templates"


def _printable(value: Any) -> Any:
    """No name changes the direction of the text around it; also within what is inserted unescaped."""
    if isinstance(value, Markup):
        return Markup(printable(str(value)))
    return printable(value) if isinstance(value, str) else value


TEMPLATES = Environment(
    loader=FileSystemLoader(TEMPLATE_FOLDER),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    finalize=_printable,
)


def write_page(
    runs: list[RunResult], comparisons: Comparisons, curves: CertifiedCurves, classes: ClassResults, path: Path
) -> None:
    """Write the page of comparable runs (`results.read_runs`) atomically.

    Takes seconds, most of them for the adversarial examples of the first run, if its data and networks are available.
    Errors: ValueError naming a damaged file of a run.
    """
    comparison_rows = differences(runs, comparisons)
    run_examples, majority = examples_of(runs[0]), classes.majority
    values = {
        "style": method_colours() + (TEMPLATE_FOLDER / "style.css").read_text(encoding="utf-8"),
        "runs": [run.folder.name for run in runs],
        "claim": claim(runs),
        "facts": _facts(runs),
        "headline": headline(runs, comparison_rows),
        "attack": attack_text(runs),
        "methods": ["dense", "HYDRA", *runs[0].baselines],
        "legend_key": legend_key,
        "accuracy": [accuracy_chart(runs, comparisons, kind, majority) for kind in reversed(KINDS)],
        "lead": difference_chart(comparison_rows, runs),
        "certified": certified_charts(runs, curves, majority),
        "against_cost": accuracy_against_cost(runs),
        "sizes": size_and_speed_cells(runs),
        "sizes_note": NOTE,
        "majority": majority,
        "useless": useless_networks(runs, majority),
        "classes": class_tables(runs, classes, claim(runs)),
        "accuracies": [_accuracy_cells(run, network) for run in runs for network in run.networks],
        "means": [_mean_cells(runs, network) for network in runs[0].networks] if len(runs) > 1 else [],
        "differences": [
            {
                "run": d.run.folder.name,
                "baseline": d.baseline,
                "pruned": pruned_text(d.keep_fraction),
                "outcome": d.outcome,
                "test": d.test,
                "points": signed(100 * d.test.difference, 2) if d.test else "",
                "interval": f"{signed(100 * d.low, 2)} to {signed(100 * d.high, 2)}",
                "p": p_text(d.test.p_value) if d.test else "",
            }
            for d in comparison_rows
        ],
        "tuning": tuning_lines(runs),
        "significant": SIGNIFICANT,
        "honesty": _honesty_groups(runs),
        "runs_in_detail": [_run_details(run, majority) for run in runs],
        "examples": _example_values(run_examples) if isinstance(run_examples, RunExamples) else None,
        "why_no_examples": "" if isinstance(run_examples, RunExamples) else run_examples,
    }
    atomic_write_text(path, TEMPLATES.get_template("page.html").render(values))


def _example_values(run_examples: RunExamples) -> dict[str, Any]:
    return {"cards": example_cards(run_examples), "network": run_examples.network.label, "attack": run_examples.attack}


def _honesty_groups(runs: list[RunResult]) -> dict[str, list[dict[str, Any]]]:
    """Status -> groups of the checks with that status, by network; empty without checks."""
    groups: dict[str, list[dict[str, Any]]] = {"warn": [], "pass": []}
    for run in runs:
        for network in run.networks:
            for status, checks in ((s, [c for c in honesty_checks(network) if c["verdict"] == s]) for s in groups):
                if checks:
                    label = network.label if len(runs) == 1 else f"{network.label}, {run.folder.name}"
                    groups[status].append({"network": label, "checks": checks})
    return groups if any(groups.values()) else {}


def _facts(runs: list[RunResult]) -> list[tuple[str, str]]:
    """The experiment in brief: (term, description)."""
    recipe = runs[0].recipe
    threat, objective = recipe.threat_model, recipe.objective
    attack = f", {objective.steps} steps of {objective.step_size}" if isinstance(objective, Attacking) else ""
    return [
        ("Recipe", recipe.name),
        ("Data set", f"{recipe.data.dataset}, {recipe.data.image_size} x {recipe.data.image_size} pixels"),
        ("Network", f"{recipe.model.arch}, {recipe.model.num_classes} classes"),
        ("Objective", f"{objective.name}{attack}"),
        ("Threat model", f"{threat.norm}, eps {threat.eps}" if threat else "none"),
        ("Evaluation", attack_text(runs)),
        ("Seed" if len(runs) == 1 else "Seeds", ", ".join(str(run.recipe.seed) for run in runs)),
    ]


def _accuracy_cells(run: RunResult, network: NetworkResult) -> dict[str, Any]:
    cells = {"run": run.folder.name, "name": network.name, "pruned": network.pruned, "evaluated": False}
    if network.evaluation is not None:
        for kind in KINDS:
            accuracy = network.evaluation.accuracy(kind)
            value, low, high = (100 * share for share in (accuracy.value, accuracy.low, accuracy.high))
            cells |= {kind: f"{value:.2f}", f"{kind}_interval": f"{low:.2f} to {high:.2f}"}
        cells |= {"evaluated": True, "images": f"{network.evaluation.images:,}"}
    return cells


def _mean_cells(runs: list[RunResult], network: NetworkResult) -> dict[str, Any]:
    """Mean and range over the seeds that are evaluated."""
    by_kind = {kind: accuracies(runs, network.name, network.keep_fraction, kind) for kind in KINDS}
    cells = {"name": network.name, "pruned": network.pruned, "seeds": f"{len(by_kind['clean'])} of {len(runs)}"}
    for kind, each in by_kind.items():
        values = [100 * accuracy["value"] for accuracy in each]
        cells[kind] = f"{fmean(values):.2f}" if values else "missing"
        cells[f"{kind}_range"] = f"{min(values):.2f} to {max(values):.2f}" if values else ""
    return cells


def _run_details(run: RunResult, majority: MajorityClass | None) -> dict[str, Any]:
    """Training curves, layers, compute and provenance of one run."""
    histories = read_history(run)
    keeps, shown = run.recipe.sparsity.keep_fractions, without_rejected_trials(histories)
    trained = [history for history in histories if history.stage.epochs]
    costs = [stage_cost(history) for history in trained]
    origin = public_provenance(run.folder)
    return {
        "run": run.folder.name,
        "training": [
            (pruned_text(keep), charts) for keep in keeps if (charts := training_charts(run, shown, keep, majority))
        ],
        "layers": [chart for keep in keeps if (chart := layer_chart(run, keep))],
        "layer_table": _layer_table(run),
        "costs": [_cost_cells(h, cost, costs) for h, cost in zip(trained, costs, strict=True)],
        "total": _total(costs),
        "parts": [(h.stage.name, _part_cells([cost])) for h, cost in zip(trained, costs, strict=True)],
        "total_parts": _part_cells(costs),
        "stages": [_parentage(history, run.recipe.model.weights) for history in histories],
        "origin": _origin_rows(origin),
        "versions": origin.get("versions", {}),
        "recipe": dump_yaml(public_recipe(run.recipe)),
    }


def _layer_table(run: RunResult) -> dict[str, Any]:
    """Kept connections, layers by networks. Networks with equal counts in every layer share a column."""
    columns: dict[tuple[str, tuple[int, ...]], list[str]] = {}
    layers: tuple[KeptCount, ...] = ()
    for network in run.networks:
        if network.name != "dense" and network.layers:
            layers = network.layers
            counts = tuple(layer.kept for layer in network.layers)
            columns.setdefault((network.pruned, counts), []).append(network.name)
    heads = [{"pruned": share, "names": ", ".join(names)} for (share, _), names in columns.items()]
    rows = []
    for i, layer in enumerate(layers):
        kept = [{"kept": f"{c[i]:,}", "share": f"{100 * c[i] / layer.total:.3g}"} for _, c in columns]
        rows.append({"number": i + 1, "name": layer.name, "total": f"{layer.total:,}", "kept": kept})
    return {"heads": heads, "rows": rows}


def _cost_cells(history: History, cost: StageCost, costs: list[StageCost]) -> dict[str, Any]:
    total_s = sum(each.seconds for each in costs)
    return {
        "stage": history.stage.name,
        "state": "trained" if history.result else "in progress",
        "epochs": f"{cost.epochs:.4g}",
        "steps": f"{cost.steps:,}",
        "pass_epochs": "" if cost.pass_epochs is None else f"{cost.pass_epochs:,.1f}",
        "train": _duration(cost.train_s),
        "held_out": _duration(cost.held_out_s),
        "speed": f"{cost.images / cost.train_s:,.0f}" if cost.train_s else "",
        "share": f"{100 * cost.seconds / total_s:.0f}" if total_s else "0",
    }


def _total(costs: list[StageCost]) -> dict[str, str]:
    passes = [cost.pass_epochs for cost in costs if cost.pass_epochs is not None]
    return {
        "epochs": f"{sum(cost.epochs for cost in costs):.4g}",
        "steps": f"{sum(cost.steps for cost in costs):,}",
        "pass_epochs": f"{sum(passes):,.1f}" if passes and len(passes) == len(costs) else "",
        "train": _duration(sum(cost.train_s for cost in costs)),
        "held_out": _duration(sum(cost.held_out_s for cost in costs)),
    }


def _part_cells(costs: list[StageCost]) -> dict[str, str]:
    """Part -> percent of the training time; empty without a breakdown."""
    seconds = {part: sum(cost.seconds_in[part] for cost in costs) for part in PARTS}
    total_s = sum(seconds.values())
    return {part: f"{100 * part_s / total_s:.1f} %" for part, part_s in seconds.items()} if total_s else {}


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 3600 else f"{seconds / 3600:.2f} h"


def _parentage(history: History, weights: str | None) -> dict[str, str]:
    """`weights`: the file that the dense network has its weights from."""
    result, stage = history.result, history.stage
    parent = weights if stage.label == DENSE else stage.starts_from
    return {
        "stage": stage.name,
        "parent": (result.chosen.stage if result and result.chosen else parent) or "",
        "selected": "" if result is None or result.selected_step is None else str(result.selected_step),
        "model": "" if result is None else result.model_sha256,
        "mask": "" if result is None else result.mask_sha256 or "",
    }


def _origin_rows(origin: dict[str, Any]) -> list[tuple[str, str]]:
    names = {"commit": "Commit", "created": "Started", "machine": "Architecture"}
    names |= {"processor": "Processor", "cores": "Cores", "gpus": "GPUs", "python": "Python"}
    names |= {"recipe_sha256": "Recipe, SHA-256"}
    rows = []
    for key, name in names.items():
        value = origin.get(key)
        if key == "commit" and key in origin:
            rows.append((name, value or "unknown: not run from a git checkout"))
        elif key == "gpus" and value is not None:
            rows.append((name, "; ".join(value) or "none"))
        elif value is not None:
            rows.append((name, str(value)))
    return rows + [(f"{key}, SHA-256", str(value)) for key, value in origin.get("data_sha256", {}).items()]
