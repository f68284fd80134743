"""card.json: what an exported folder holds, as typed records with one reader."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from pydantic import computed_field

from pipeline.deployment.attack_result import FileAttackResult
from pipeline.deployment.formats import FILES, Format
from pipeline.evaluation.result import Accuracy, HonestySummary
from pipeline.run.files import atomic_write_json
from pipeline.run.layout import CARD
from pipeline.run.records import Count, Record


class ExportedFile(Record):
    """One file of the network; a copy that gzip compressed lies beside it as <name>.gz."""

    format: Format
    size: Count
    """Bytes."""
    compressed: Count
    """Bytes of the compressed copy."""
    sha256: str
    nonzero_weights: Count | None = None
    """Of convolutions and linear layers in an ONNX file; absent for others."""

    @property
    def name(self) -> str:
        return FILES[self.format]


class Training(Record):
    """Where the network is from; absent for a file outside a run."""

    run: str
    """Name in the recipe."""
    method: str
    """Title: HYDRA, magnitude, dense."""
    dataset: str
    objective: str
    threat_model: str | None = None
    """Norm and radius."""
    recipe_sha256: str
    data_sha256: dict[str, str]
    """Recipe key -> hash of the data file."""
    commit: str | None = None
    """Of this project, when the run was started."""


class NetworkEvaluation(Record):
    """What the run's own evaluation says about the network, on the test set."""

    title: str
    images: Count
    clean_accuracy: Accuracy
    robust_accuracy: Accuracy
    honesty: HonestySummary | None = None


class MeasuredSpeed(Record):
    """How fast a file is."""

    name: str
    """Of the file and the runtime."""
    milliseconds: float
    """Per image, one at a time on one thread."""
    times_as_fast: float
    """As the machine's reference."""
    machine: str
    """Processor, and what the reference is."""


class Card(Record):
    FIX: ClassVar[str] = "restore it, or export again"

    version: int = 1
    network: dict[str, Any]
    """The metadata of model.safetensors, which the ONNX files have too."""
    model_sha256: str
    """Of model.safetensors."""
    image_size: Count
    """Pixels."""
    files: tuple[ExportedFile, ...]
    others_sha256: dict[str, str]
    """Name -> hash of the files beside them."""
    training: Training | None = None
    evaluation: NetworkEvaluation | None = None
    attack: FileAttackResult | None = None
    """Of the int8 file, or of the float32 one if there is no other."""
    speeds: tuple[MeasuredSpeed, ...] = ()

    @computed_field
    @property
    def stamped(self) -> bool:
        """Whether the file was attacked and nothing speaks against its robust accuracy."""
        return self.attack is not None and not self.attack.doubts

    def file(self, sha256: str) -> ExportedFile | None:
        return next((file for file in self.files if file.sha256 == sha256), None)


def write_card(folder: Path, card: Card) -> None:
    atomic_write_json(folder / CARD, card.model_dump(mode="json", by_alias=True, exclude_none=True))
