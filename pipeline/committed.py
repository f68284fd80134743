"""What of a run is done, told from the files that are written last. No torch: login nodes and watchers ask too."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from pipeline.phases import Stage


def is_done(run_folder: Path, stage: Stage) -> bool:
    """Whether nothing of a stage is left to do, its evaluation included."""
    folder = run_folder / stage.name
    evaluated = stage.measure is None or evaluation_path(folder, stage.measure).exists()
    return evaluated and (folder / "result.json").exists()


def evaluation_path(stage_folder: Path, measure: str) -> Path:
    """Where the counts of a finished evaluation are; its verdicts lie beside it as parquet."""
    return stage_folder / "evaluate" / f"{measure}.json"


def progress_marks(run_folder: Path, stage_names: Iterable[str]) -> list[int]:
    """Changes whenever something of these stages was committed: a checkpoint, a result, a chunk of an evaluation."""
    marks = []
    for name in stage_names:
        folder = run_folder / name
        steps = [int(path.parent.name.removeprefix("step-")) for path in folder.glob("step-*/MANIFEST.json")]
        marks += [max(steps, default=0), int((folder / "result.json").exists())]
        marks += [len(list((folder / "evaluate").glob(pattern))) for pattern in ("*.parquet", "*.chunks/*.parquet")]
    return marks
