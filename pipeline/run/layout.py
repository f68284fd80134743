"""Every path of a run directory, and which stages and evaluations are complete, by the files that commit them.

No torch: login nodes and `launch status` ask too.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from pipeline.recipe.stages import Stage

CARD, MODEL_CARD = "card.json", "README.md"
"""In an exported folder: what it holds, as data and as a model card."""
HONESTY = "honesty checks"
"""The name of the honesty checks in `evaluation_progress`."""


@dataclass(frozen=True)
class RunFolder:
    """The files of a run that belong to no stage."""

    path: Path

    @property
    def recipe(self) -> Path:
        """The resolved recipe; a folder that has it is a run directory."""
        return self.path / "recipe.yaml"

    @property
    def provenance(self) -> Path:
        return self.path / "provenance.json"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def report(self) -> Path:
        return self.path / "report"

    @property
    def benchmark(self) -> Path:
        """What `launch benchmark` has measured of the run's networks (`pipeline.run.benchmark.Benchmark`)."""
        return self.path / "benchmark.json"


@dataclass(frozen=True)
class StageFolder:
    """The files of a stage; checkpoints are `pipeline.run.checkpoint`'s."""

    path: Path

    @property
    def plan(self) -> Path:
        """What the stage is going to do: steps, batch, phase. Written when it begins."""
        return self.path / "stage.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def network(self) -> Path:
        """The exported network."""
        return self.path / "model.safetensors"

    @property
    def export(self) -> Path:
        """Folder of the network's files for other programs, with their card."""
        return self.path / "export"

    @property
    def result(self) -> Path:
        """Commits the stage: it exists if and only if training is finished."""
        return self.path / "result.json"

    @property
    def honesty(self) -> Path:
        return self.path / "honesty.json"

    @property
    def evaluations(self) -> Path:
        return self.path / "evaluate"

    @property
    def evaluation_progress(self) -> Path:
        """How far the evaluation under way is."""
        return self.evaluations / "progress.json"

    def evaluation(self, name: str) -> Path:
        """Commits an evaluation; its verdicts lie beside it as parquet."""
        return self.evaluations / f"{name}.json"


def is_done(run_folder: Path, stage: Stage) -> bool:
    """Whether a stage is complete, its evaluations included."""
    return not unevaluated(run_folder, stage) and StageFolder(run_folder / stage.name).result.exists()


def unevaluated(run_folder: Path, stage: Stage) -> list[str]:
    """Those of `stage.evaluations` that are not complete."""
    folder = StageFolder(run_folder / stage.name)
    return [name for name in stage.evaluations if not folder.evaluation(name).exists()]


def progress_marks(run_folder: Path, stage_names: Iterable[str]) -> list[int]:
    """Numbers that change whenever these stages commit something: a checkpoint, a result, a chunk of an evaluation."""
    marks = []
    for folder in (StageFolder(run_folder / name) for name in stage_names):
        steps = [int(path.parent.name.removeprefix("step-")) for path in folder.path.glob("step-*/MANIFEST.json")]
        marks += [max(steps, default=0), int(folder.result.exists())]
        marks += [len(list(folder.evaluations.glob(pattern))) for pattern in ("*.parquet", "*.chunks/*.parquet")]
    return marks
