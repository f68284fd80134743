"""The folder of one exported network: its files in every format, each beside a compressed copy."""

from __future__ import annotations

import gzip
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from pipeline.deployment.calibration import calibration_batches
from pipeline.deployment.formats import FILES, Format
from pipeline.deployment.int8_file import write_int8
from pipeline.deployment.onnx_file import write_onnx
from pipeline.deployment.smaller_network import has_pruned_channels, write_smaller
from pipeline.deployment.torch_program import write_program
from pipeline.evaluation.load import LoadedNetwork
from pipeline.recipe.schema import Recipe
from pipeline.run.files import make_folder, replacing

COMPRESSION = 9
SMALLER = "model.safetensors"
"""The network without its pruned channels, which `pipeline.load` reads."""


@dataclass(frozen=True)
class ExportedFile:
    path: Path
    size: int
    """Bytes."""
    compressed: int
    """Bytes of the copy beside it, <name>.gz."""


def export_network(
    network: LoadedNetwork, recipe: Recipe | None, formats: tuple[Format, ...], folder: Path
) -> list[ExportedFile]:
    """Write the network to `folder` in each of `formats`; files that are there are replaced.

    If its channels were pruned, all files are of the network without them, and it is written as model.safetensors, too.

    `recipe` is that of its run, whose held-out images calibrate int8. Errors: CannotExport; ValueError for int8
    without a recipe; DataError.
    """
    if "onnx-int8" in formats and recipe is None:
        raise ValueError(
            f"{network.file} is not inside a run, whose held-out images would choose the ranges of int8; export the "
            "run, or use --format onnx torch"
        )
    size = network.metadata.get("image_size") or (recipe and recipe.data.image_size)
    if size is None:
        raise ValueError(f"{network.file} does not say the size of its images; export the run that it is from")
    make_folder(folder)
    written: list[ExportedFile] = []
    if has_pruned_channels(network):
        network = write_smaller(network, size, folder / SMALLER)
        written.append(_with_copy(network.file))
    with tempfile.TemporaryDirectory(prefix=".export-", dir=folder) as temporary:
        # int8 is made from the float file, which is kept only if it is asked for.
        float_file = (folder if "onnx" in formats else Path(temporary)) / FILES["onnx"]
        if {"onnx", "onnx-int8"} & set(formats):
            write_onnx(network, size, float_file, network.metadata)
        for name in formats:
            path = folder / FILES[name]
            if name == "onnx-int8":
                assert recipe is not None
                write_int8(float_file, calibration_batches(network, recipe), path)
            elif name == "torch":
                write_program(network, size, path)
            written.append(_with_copy(path))
    return written


def _with_copy(path: Path) -> ExportedFile:
    return ExportedFile(path, path.stat().st_size, _compress(path))


def _compress(path: Path) -> int:
    """Write <path>.gz, the same bytes for the same file; returns its size."""
    with replacing(path.with_name(path.name + ".gz")) as temporary:
        with (
            path.open("rb") as source,
            temporary.open("wb") as raw,
            gzip.GzipFile("", "wb", COMPRESSION, raw, mtime=0) as stream,
        ):
            shutil.copyfileobj(source, stream)
        return temporary.stat().st_size
