"""Which stages and evaluations of a run are complete, as their commit files show. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from pipeline.recipe.stages import Stage


def is_done(run_folder: Path, stage: Stage) -> bool:
    """Whether a stage is complete, including its evaluations."""
    return not unevaluated(run_folder, stage) and (run_folder / stage.name / "result.json").exists()


def unevaluated(run_folder: Path, stage: Stage) -> list[str]:
    """The elements of `stage.evaluations` without a result, in their order."""
    return [name for name in stage.evaluations if not evaluation_path(run_folder / stage.name, name).exists()]


def evaluation_path(stage_folder: Path, evaluation: str) -> Path:
    """Path of a finished evaluation's counts; its verdicts are next to it, as parquet."""
    return stage_folder / "evaluate" / f"{evaluation}.json"


def honesty_path(stage_folder: Path) -> Path:
    """Path of the honesty checks of a stage's network."""
    return stage_folder / "honesty.json"


def progress_marks(run_folder: Path, stage_names: Iterable[str]) -> list[int]:
    """A value that changes with every commit of these stages: a checkpoint, a result, or a chunk of an evaluation."""
    marks = []
    for name in stage_names:
        folder = run_folder / name
        steps = [int(path.parent.name.removeprefix("step-")) for path in folder.glob("step-*/MANIFEST.json")]
        marks += [max(steps, default=0), int((folder / "result.json").exists())]
        marks += [len(list((folder / "evaluate").glob(pattern))) for pattern in ("*.parquet", "*.chunks/*.parquet")]
    return marks
