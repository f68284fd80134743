"""What networks withstand besides, by `evaluation.attacks` or by `launch evaluate`: rows, and their table as text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.evaluation.corruptions.measure import SEVERITIES
from pipeline.report.results import NetworkResult, RunResult
from pipeline.run.files import read_json


def kept_evaluations(network: NetworkResult) -> list[tuple[Path, dict[str, Any]]]:
    """Files and counts of every evaluation of a network, its measure's own among them, by file name.

    Files that cannot be read are left out, as are those of another `model_sha256`: of the network before it was trained
    anew. Honesty checks are no evaluation.
    """
    result = network.folder / "result.json"
    model = read_json(result)["model_sha256"] if result.exists() else None
    found = []
    for path in sorted((network.folder / "evaluate").glob("*.json")):
        try:
            facts = read_json(path)
        except ValueError:
            continue
        if facts.get("model_sha256", "") == model and facts["attack"] != "honesty":
            found.append((path, facts))
    return found


def extra_evaluations(network: NetworkResult) -> list[dict[str, Any]]:
    """Counts of every evaluation of a network but its measure's own, ordered by what was done."""
    found = [facts for _, facts in kept_evaluations(network) if facts != network.evaluation]
    return sorted(found, key=lambda facts: (facts["title"], facts["images"]))


def _checks(facts: dict[str, Any]) -> list[dict[str, str]]:
    return facts.get("honesty", {}).get("checks", [])


def _by_severity(facts: dict[str, Any]) -> list[float | None]:
    return facts.get("severity_accuracy", [None] * len(SEVERITIES))


def extra_rows(runs: list[RunResult]) -> list[dict[str, Any]]:
    """One row per evaluation, those of one attack together, and within them networks in the runs' order."""
    rows = [
        {
            "run": run.folder.name,
            "seed": run.recipe.seed,
            "network": network.name,
            "keep_fraction": network.keep_fraction,
            "pruned_percent": network.pruned.removesuffix(" %"),
            **{key: facts[key] for key in ("attack", "title", "images", "chunk")},
            **{key: facts["settings"].get(key) for key in ("norm", "eps")},
            **{f"{kind}_correct": facts[f"{kind}_correct"] for kind in ("clean", "robust")},
            **{
                f"{kind}_accuracy_{part}": facts[f"{kind}_accuracy"][part]
                for kind in ("clean", "robust")
                for part in ("value", "low", "high")
            },
            "flags": " ".join(flag for flag, images in facts.get("flags", {}).items() if images),
            "honesty_warnings": ", ".join(c["name"] for c in _checks(facts) if c["verdict"] == "warn"),
            "mean_corruption_accuracy": facts.get("mean_corruption_accuracy"),
            **{f"severity_{s}_accuracy": value for s, value in zip(SEVERITIES, _by_severity(facts), strict=True)},
        }
        for run in runs
        for network in run.networks
        for facts in extra_evaluations(network)
    ]
    return sorted(rows, key=lambda row: (row["title"], row["images"]))


def extra_table(rows: list[dict[str, Any]]) -> str:
    """The rows as text; accuracies in percent. Empty without rows."""
    if not rows:
        return ""
    cells = [["besides", "images", "seed", "network", "pruned", "clean %", "robust %", "95 % interval", "doubts"]]
    for row in rows:
        value, low, high = (100 * row[f"robust_accuracy_{part}"] for part in ("value", "low", "high"))
        clean = f"{100 * row['clean_accuracy_value']:.2f}"
        where = [row["title"], f"{row['images']:,}", str(row["seed"]), row["network"], f"{row['pruned_percent']} %"]
        warned = f"honesty: {row['honesty_warnings']}" if row["honesty_warnings"] else ""
        doubts = "; ".join(filter(None, [row["flags"], warned]))
        cells.append([*where, clean, f"{value:.2f}", f"[{low:.2f}, {high:.2f}]", doubts])
    return _aligned(cells, "lrrlrrrrl")


def corruption_table(rows: list[dict[str, Any]]) -> str:
    """Mean accuracy, in percent, over the corruptions that are counted, by severity and over all; empty without any."""
    corrupted = [row for row in rows if row["severity_1_accuracy"] is not None]
    if not corrupted:
        return ""
    severities = [f"severity_{severity}_accuracy" for severity in SEVERITIES]
    cells = [
        [
            "mean over corruptions, %",
            "images",
            "seed",
            "network",
            "pruned",
            *(f"severity {s}" for s in SEVERITIES),
            "all",
        ]
    ]
    for row in corrupted:
        where = [row["title"].rpartition(", ")[2], f"{row['images']:,}", str(row["seed"]), row["network"]]
        values = [f"{100 * row[key]:.2f}" for key in (*severities, "mean_corruption_accuracy")]
        cells.append([*where, f"{row['pruned_percent']} %", *values])
    return _aligned(cells, "lrrlrrrrrrr")


def _aligned(cells: list[list[str]], sides: str) -> str:
    """Lines of equally wide columns, each to the left or to the right."""
    widths = [max(len(line[column]) for line in cells) for column in range(len(sides))]
    pads = [str.ljust if side == "l" else str.rjust for side in sides]
    return "\n".join(
        "  ".join(pad(cell, width) for pad, cell, width in zip(pads, line, widths, strict=True)).rstrip()
        for line in cells
    )
