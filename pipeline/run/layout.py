"""What of a run is done, told from the files that are written last. No torch: login nodes and watchers ask too."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from pipeline.recipe.stages import Stage


def is_done(run_folder: Path, stage: Stage) -> bool:
    """Whether nothing of a stage is left to do, its evaluations included."""
    return not unevaluated(run_folder, stage) and (run_folder / stage.name / "result.json").exists()


def unevaluated(run_folder: Path, stage: Stage) -> list[str]:
    """Those of `stage.evaluations` that are not done."""
    return [name for name in stage.evaluations if not evaluation_path(run_folder / stage.name, name).exists()]


def evaluation_path(stage_folder: Path, evaluation: str) -> Path:
    """Where the counts of a finished evaluation are; its verdicts lie beside it as parquet."""
    return stage_folder / "evaluate" / f"{evaluation}.json"


def honesty_path(stage_folder: Path) -> Path:
    """Where the honesty checks of a stage's network are."""
    return stage_folder / "honesty.json"


def progress_marks(run_folder: Path, stage_names: Iterable[str]) -> list[int]:
    """Changes whenever something of these stages was committed: a checkpoint, a result, a chunk of an evaluation."""
    marks = []
    for name in stage_names:
        folder = run_folder / name
        steps = [int(path.parent.name.removeprefix("step-")) for path in folder.glob("step-*/MANIFEST.json")]
        marks += [max(steps, default=0), int((folder / "result.json").exists())]
        marks += [len(list((folder / "evaluate").glob(pattern))) for pattern in ("*.parquet", "*.chunks/*.parquet")]
    return marks
