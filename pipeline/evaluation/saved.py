"""Saved evaluations: result files, whose every count is recomputed from the verdicts beside them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from pipeline.evaluation.chunks import read_verdicts
from pipeline.evaluation.measures.base import Verdicts, summarise
from pipeline.evaluation.result import EvaluationHeader, EvaluationResult

COUNTED = {"images"} | EvaluationResult.model_fields.keys() - EvaluationHeader.model_fields.keys() - {"honesty"}
"""Fields of a result that are computed from its verdicts."""


def read_evaluation(path: Path) -> EvaluationResult:
    """Read a result file. Errors: ValueError naming the file if it or its verdicts are missing, damaged or differ."""
    result = EvaluationResult.read(path)
    check_counts(path, result, read_verdicts(path.with_suffix(".parquet")))
    return result


def check_counts(path: Path, result: EvaluationResult, verdicts: Verdicts) -> None:
    """Errors: ValueError naming the first number of a result that is not the verdicts'."""
    expected, recorded = summarise(verdicts), result.model_dump()
    if result.severity_accuracy is None:  # by a version that had another mean over corruptions
        for key in ("corruption_accuracy", "severity_accuracy", "mean_corruption_accuracy"):
            expected.pop(key, None)
            recorded.pop(key)
    for key in (key for key in recorded if key in COUNTED and recorded.get(key) is not None):
        if not _equal(recorded[key], value := expected.get(key)):
            raise ValueError(
                f"{path} is damaged: its {key} is {_short(recorded[key])}, and its verdicts give {_short(value)}; "
                "delete it and evaluate again"
            )


def _equal(recorded: Any, value: Any) -> bool:
    if isinstance(recorded, dict) and isinstance(value, dict):
        return recorded.keys() == value.keys() and all(_equal(recorded[key], value[key]) for key in recorded)
    if isinstance(recorded, (list, tuple)) and isinstance(value, (list, tuple)):
        return len(recorded) == len(value) and all(map(_equal, recorded, value))
    if isinstance(recorded, float) and isinstance(value, float):
        return math.isclose(recorded, value, rel_tol=1e-6, abs_tol=1e-9)
    return recorded == value


def _short(value: Any) -> str:
    return str(value.get("value", value) if isinstance(value, dict) else value)[:100]
