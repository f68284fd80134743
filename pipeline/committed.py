"""What of a run is done, told from the files that are written last. No torch: login nodes and watchers ask too."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from pipeline.phases import Stage


def is_done(run_folder: Path, stage: Stage) -> bool:
    """Whether nothing of a stage is left to do, its evaluation included."""
    folder = run_folder / stage.name
    evaluated = not stage.evaluated or (folder / "evaluate" / "pgd.json").exists()
    return evaluated and (folder / "result.json").exists()


def progress_marks(run_folder: Path, stage_names: Iterable[str]) -> list[int]:
    """Grows whenever something of these stages was committed: a checkpoint, a result, an evaluation."""
    marks = []
    for name in stage_names:
        folder = run_folder / name
        steps = [int(path.parent.name.removeprefix("step-")) for path in folder.glob("step-*/MANIFEST.json")]
        marks += [max(steps, default=0), int((folder / "result.json").exists())]
        marks.append(int((folder / "evaluate" / "pgd.json").exists()))
    return marks
