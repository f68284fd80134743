"""Accuracy per class and confusion matrices of the page, one block per network."""

from __future__ import annotations

from bisect import bisect_right
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.report.per_class import ABSTAINED, ClassResults
from pipeline.report.results import RunResult

MOST_CLASSES = 25
"""Rows of a table. With more classes it has those of the lowest robust accuracy, and there is no matrix."""
SHADES = (0.01, 0.1, 0.4, 0.75)
"""Fractions of a row from which a matrix's cell has the first, second... shade of the style sheet."""


def class_tables(runs: list[RunResult], results: ClassResults, claim: str) -> list[dict[str, Any]]:
    """Blocks of the evaluated networks, in the recipe's order; seeds are added up. The sparsest HYDRA network's block
    is open."""
    blocks = []
    for network in runs[0].networks:
        verdicts = results.of(network.name, network.keep_fraction)
        if not verdicts:
            continue
        classes = len(results.class_names)
        counts = np.sum([each.per_class(classes) for each in verdicts], axis=0)
        confusion = np.sum([each.confusion(classes) for each in verdicts], axis=0)
        shown = np.flatnonzero(counts[0])
        order = shown[np.argsort(counts[2, shown] / counts[0, shown], kind="stable")]
        lowest, rows = int(order[0]), shown if len(shown) <= MOST_CLASSES else order[:MOST_CLASSES]
        blocks.append(
            {
                "network": network.label,
                "name": network.name,
                "lowest": f"{results.class_names[lowest]}, {_share(counts[2, lowest], counts[0, lowest])} {claim}",
                "rows": [_class_cells(results.class_names, counts, confusion, int(label)) for label in rows],
                "left_out": len(shown) - len(rows),
                "matrix": _matrix(results.class_names, confusion) if classes <= MOST_CLASSES else None,
                "open": False,
            }
        )
    for block in reversed(blocks):
        if block["name"] == "HYDRA" or block is blocks[0]:
            block["open"] = True
            break
    return blocks


def _class_cells(
    names: list[str], counts: NDArray[np.int64], confusion: NDArray[np.int64], label: int
) -> dict[str, str]:
    images, clean, robust = counts[:, label].tolist()
    wrong = confusion[label].copy()
    wrong[label] = 0
    most = int(wrong.argmax())
    mistaken = f"{[*names, ABSTAINED][most]}, {_share(wrong[most], images)}" if wrong[most] else ""
    cells = {"class": names[label], "images": f"{images:,}", "mistaken": mistaken}
    return cells | {"clean": _percent(clean, images), "robust": _percent(robust, images)}


def _matrix(names: list[str], confusion: NDArray[np.int64]) -> dict[str, Any]:
    """Rows: true classes; columns: predicted ones. Percent of the row's images, and the shade of the cell."""
    columns = [*names, ABSTAINED] if confusion[:, -1].any() else names
    rows = []
    for label, counts in enumerate(confusion.tolist()):
        total = max(sum(counts), 1)
        cells = [
            {
                "percent": f"{100 * count / total:.0f}" if count else "",
                "shade": bisect_right(SHADES, count / total),
                "right": predicted == label,
            }
            for predicted, count in enumerate(counts[: len(columns)])
        ]
        rows.append({"name": names[label], "cells": cells})
    return {"columns": columns, "rows": rows}


def _share(count: int, total: int) -> str:
    return f"{_percent(count, total)}\N{NO-BREAK SPACE}%"


def _percent(count: int, total: int) -> str:
    return f"{100 * count / total:.1f}"
