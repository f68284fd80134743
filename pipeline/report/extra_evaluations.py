"""Further evaluations, by `evaluation.attacks` or `launch evaluate`: their rows and text tables."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.evaluation.chunks import read_verdicts
from pipeline.evaluation.corruptions.measure import SEVERITIES
from pipeline.evaluation.result import KINDS, EvaluationResult
from pipeline.evaluation.saved import check_counts
from pipeline.report.results import NetworkResult, RunResult
from pipeline.report.text_table import text_table
from pipeline.run.layout import StageFolder

WITHOUT_SEVERITIES = [None] * len(SEVERITIES)
NUMBERS = (
    *("attack", "title", "images", "chunk", "norm", "eps"),
    *(f"{kind}_correct" for kind in KINDS),
    *(f"{kind}_accuracy_{part}" for kind in KINDS for part in ("value", "low", "high")),
    *("flags", "honesty_warnings", "mean_corruption_accuracy"),
    *(f"severity_{severity}_accuracy" for severity in SEVERITIES),
)
"""Columns of an evaluation."""


@dataclass(frozen=True)
class DamagedEvaluation:
    """A result file whose numbers are not shown."""

    file: Path
    reason: str


def saved_evaluations(network: NetworkResult) -> list[tuple[Path, EvaluationResult] | DamagedEvaluation]:
    """All evaluations of a network, including its own measure's, sorted by file name.

    Those of another `model_sha256`, that is, of an earlier training of the network, are skipped; honesty checks and
    progress do not count as evaluations.
    """
    evaluations = []
    for path in sorted(StageFolder(network.folder).evaluations.glob("*.json")):
        if path.name.startswith("honesty") or path == StageFolder(network.folder).evaluation_progress:
            continue
        try:
            evaluation = EvaluationResult.read(path)
            if evaluation.model_sha256 == network.model_sha256 and evaluation.attack != "honesty":
                check_counts(path, evaluation, read_verdicts(path.with_suffix(".parquet")))
                evaluations.append((path, evaluation))
        except ValueError as error:
            evaluations.append(DamagedEvaluation(path, str(error)))
    return evaluations


def kept_evaluations(network: NetworkResult) -> list[tuple[Path, EvaluationResult]]:
    """Files and results of the intact ones of `saved_evaluations`."""
    return [entry for entry in saved_evaluations(network) if not isinstance(entry, DamagedEvaluation)]


def _honesty_warnings(evaluation: EvaluationResult) -> list[str]:
    checks = evaluation.honesty.checks if evaluation.honesty is not None else ()
    return [check.name for check in checks if check.status == "warn"]


def extra_rows(runs: list[RunResult]) -> list[dict[str, Any]]:
    """One row per evaluation except those by the networks' own measure, grouped by attack and number of images.

    Networks are in the runs' order. A damaged evaluation has a row without numbers, last, and why it is "missing".
    """
    rows = []
    for run in runs:
        for network in run.networks:
            labels = {
                "run": run.folder.name,
                "seed": run.recipe.seed,
                "network": network.name,
                "keep_fraction": network.keep_fraction,
                "pruned_percent": network.pruned.removesuffix(" %"),
            }
            for entry in saved_evaluations(network):
                if isinstance(entry, DamagedEvaluation):
                    rows.append(labels | dict.fromkeys(NUMBERS) | {"title": entry.file.stem, "missing": entry.reason})
                elif entry[1] != network.evaluation:
                    rows.append(labels | _numbers(entry[1]) | {"missing": ""})
    return sorted(rows, key=lambda row: (bool(row["missing"]), row["title"], row["images"] or 0))


def _numbers(evaluation: EvaluationResult) -> dict[str, Any]:
    return {
        **{key: getattr(evaluation, key) for key in ("attack", "title", "images", "chunk")},
        **{key: evaluation.settings.get(key) for key in ("norm", "eps")},
        **{f"{kind}_correct": evaluation.correct(kind) for kind in KINDS},
        **{
            f"{kind}_accuracy_{part}": value
            for kind in KINDS
            for part, value in evaluation.accuracy(kind).to_json().items()
        },
        "flags": " ".join(flag for flag, images in (evaluation.flags or {}).items() if images),
        "honesty_warnings": ", ".join(_honesty_warnings(evaluation)),
        "mean_corruption_accuracy": evaluation.mean_corruption_accuracy,
        **{
            f"severity_{severity}_accuracy": value
            for severity, value in zip(SEVERITIES, evaluation.severity_accuracy or WITHOUT_SEVERITIES, strict=True)
        },
    }


def extra_table(rows: list[dict[str, Any]]) -> str:
    """Format the rows as text, accuracies in percent; empty without rows."""
    if not rows:
        return ""
    cells = [["attack", "images", "seed", "network", "pruned", "clean %", "robust %", "95 % interval", "warnings"]]
    for row in rows:
        if row["missing"]:
            labels = [row["title"], "", str(row["seed"]), row["network"], f"{row['pruned_percent']} %"]
            cells.append([*labels, "missing", "missing", "", row["missing"]])
            continue
        value, low, high = (100 * row[f"robust_accuracy_{part}"] for part in ("value", "low", "high"))
        clean = f"{100 * row['clean_accuracy_value']:.2f}"
        labels = [row["title"], f"{row['images']:,}", str(row["seed"]), row["network"], f"{row['pruned_percent']} %"]
        honesty = f"honesty: {row['honesty_warnings']}" if row["honesty_warnings"] else ""
        warnings = "; ".join(filter(None, [row["flags"], honesty]))
        cells.append([*labels, clean, f"{value:.2f}", f"[{low:.2f}, {high:.2f}]", warnings])
    return text_table(cells, left=["attack", "network", "warnings"])


def corruption_table(rows: list[dict[str, Any]]) -> str:
    """Format the mean accuracy over corruptions, in percent, per severity and overall; empty without any."""
    corruption_rows = [row for row in rows if row["severity_1_accuracy"] is not None]
    if not corruption_rows:
        return ""
    severities = [f"severity_{severity}_accuracy" for severity in SEVERITIES]
    title = "mean over corruptions, %"
    cells = [[title, "images", "seed", "network", "pruned", *(f"severity {s}" for s in SEVERITIES), "all"]]
    for row in corruption_rows:
        labels = [row["title"].rpartition(", ")[2], f"{row['images']:,}", str(row["seed"]), row["network"]]
        values = [f"{100 * row[key]:.2f}" for key in (*severities, "mean_corruption_accuracy")]
        cells.append([*labels, f"{row['pruned_percent']} %", *values])
    return text_table(cells, left=[title, "network"])
