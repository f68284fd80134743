"""The file that `model.weights` names: a file, or the dense network of a finished run. Imports no torch."""

from __future__ import annotations

from pathlib import Path

from pipeline.run.files import sha256_of
from pipeline.run.layout import RunFolder, StageFolder
from pipeline.run.records import StageResult

FIX = "name a file of weights, or the folder of a run"


def weights_file(path: Path) -> Path:
    """The file that a value of `model.weights` stands for.

    Errors: ValueError if there is none, for a run whose dense network is not finished, or was replaced since.
    """
    if not path.is_dir():
        if not path.is_file():
            raise ValueError(f"model.weights = {path} does not exist; {FIX}, or leave the key out")
        return path
    if not RunFolder(path).recipe.is_file():
        raise ValueError(f"model.weights = {path} is a folder and not a run's (it has no recipe.yaml); {FIX}")
    dense = StageFolder(path / "pretrain")
    if not dense.result.is_file():
        raise ValueError(f"model.weights = {path}: its dense network is not finished: python -m launch resume {path}")
    if not dense.network.is_file() or sha256_of(dense.network) != StageResult.read(dense.result).model_sha256:
        raise ValueError(
            f"model.weights = {path}: {dense.network} is not the network that the run exported (its sha256 differs "
            "from result.json); restore that file, or name the file itself"
        )
    return dense.network
