"""What a benchmark measures: one file in one runtime each, with its size and cost."""

from __future__ import annotations

import gzip
import warnings
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx
import torch
from google.protobuf.message import DecodeError
from torch import nn

from pipeline.deployment.file_cost import QUANTISED, onnx_cost, program_cost
from pipeline.deployment.formats import COMPRESSION, FILES
from pipeline.deployment.image_size import image_size_of
from pipeline.deployment.int8_file import write_int8
from pipeline.deployment.onnx_file import random_images, write_onnx
from pipeline.deployment.runtimes import (
    Opener,
    load_openvino,
    onnxruntime_opener,
    openvino_opener,
    openvino_precision,
    torch_opener,
)
from pipeline.evaluation.load import LoadedNetwork
from pipeline.models import build_network
from pipeline.models.cost import Cost, network_cost
from pipeline.models.export import METADATA_KEY, ORIGIN, write_model
from pipeline.recipe.sections import Model
from pipeline.run.benchmark import Runtime
from pipeline.run.files import parse_json, sha256_of

MODEL_KEYS = Model.model_fields.keys() - ORIGIN
CALIBRATION_IMAGES = 8
"""Random ones: neither the size of an int8 file nor its time depends on the ranges of its activations."""


@dataclass(frozen=True)
class Origin:
    """Whose network a file is; see `run.benchmark.BenchmarkEntry`."""

    network: str
    method: str | None = None
    keep_fraction: str | None = None
    model_sha256: str | None = None


@dataclass(frozen=True)
class Sizes:
    name: str
    sha256: str
    size: int
    compressed: int

    @classmethod
    def of(cls, path: Path) -> Sizes:
        content = path.read_bytes()
        return cls(path.name, sha256_of(path), len(content), len(gzip.compress(content, COMPRESSION, mtime=0)))


@dataclass(frozen=True)
class Subject:
    """One file in one runtime."""

    origin: Origin
    runtime: Runtime
    precision: str
    sizes: Sizes
    cost: Cost
    image_size: int
    """Pixels."""
    opener: Opener
    model: Model | None = None
    """Architecture and so on, if the file says."""


def file_subjects(path: Path, origin: Origin, folder: Path) -> list[Subject]:
    """A model.safetensors as `network_subjects`; an ONNX file or a torch.export program as it is.

    Errors: CannotExport; ValueError naming the file.
    """
    if path.suffix == ".safetensors":
        return network_subjects(LoadedNetwork(path), replace(origin, model_sha256=sha256_of(path)), folder)
    return onnx_subjects(path, origin) if path.suffix == ".onnx" else [program_subject(path, origin)]


def network_subjects(network: LoadedNetwork, origin: Origin, folder: Path) -> list[Subject]:
    """A network in torch, and as ONNX files in float32 and int8, which are written to `folder`.

    Errors: CannotExport; ValueError for a network of unknown image size.
    """
    size = image_size_of(network)
    write_onnx(network, size, folder / FILES["onnx"], network.metadata)
    images = random_images(CALIBRATION_IMAGES, size, seed=0).numpy()
    write_int8(folder / FILES["onnx"], [images], folder / FILES["onnx-int8"])
    return [
        torch_subject(network, origin),
        *onnx_subjects(folder / FILES["onnx"], origin),
        *onnx_subjects(folder / FILES["onnx-int8"], origin),
    ]


def torch_subject(network: LoadedNetwork, origin: Origin) -> Subject:
    size = image_size_of(network)
    cost, sizes = network_cost(network, size), Sizes.of(network.file)
    return Subject(origin, "torch", "float32", sizes, cost, size, torch_opener(network), _model_of(network.metadata))


def onnx_subjects(path: Path, origin: Origin) -> list[Subject]:
    """An ONNX file in ONNX Runtime, and in OpenVINO where it is installed.

    Errors: ValueError naming the file.
    """
    model = _read_onnx(path)
    cost, size, sizes = onnx_cost(model, path), _onnx_image_size(model, path), Sizes.of(path)
    quantised = any(node.op_type in QUANTISED for node in model.graph.node)

    def subject(runtime: Runtime, rest: str, opener: Opener) -> Subject:
        precision = rest if not quantised else "int8" if rest == "float32" else f"int8, rest {rest}"
        return Subject(origin, runtime, precision, sizes, cost, size, opener, _model_in(model))

    subjects = [subject("onnxruntime", "float32", onnxruntime_opener(path))]
    if (openvino := load_openvino()) is not None:
        subjects.append(subject("openvino", openvino_precision(openvino, path), openvino_opener(openvino, path)))
    return subjects


def program_subject(path: Path, origin: Origin) -> Subject:
    """A torch.export program. Errors: ValueError naming the file."""
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path} is not a torch.export program")
    try:
        with path.open("rb") as stream, warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given buffer is not writable", UserWarning)  # torch's own reading
            program = torch.export.load(stream)
    except (RuntimeError, ValueError, KeyError, EOFError, OSError) as error:
        raise ValueError(f"{path} is not a torch.export program: {' '.join(str(error).split())[:300]}") from None
    (name,) = program.graph_signature.user_inputs
    shape = next(node.meta["val"].shape for node in program.graph.nodes if node.name == name)
    size = _square(tuple(int(side) if isinstance(side, int) else None for side in shape), path)
    module: nn.Module = program.module()
    return Subject(origin, "torch", "float32", Sizes.of(path), program_cost(program), size, torch_opener(module))


def dense_reference(subjects: list[Subject], folder: Path) -> Subject | None:
    """The dense network, with random weights, of the architecture that the first of the subjects which names one names.

    None if none does, as files of other programs. It is written to `folder`, for its size.
    """
    for subject in subjects:
        if (model := subject.model) is not None:
            network = build_network(model, seed=0, image_size=subject.image_size)
            file = folder / "dense.safetensors"
            write_model(file, network.backbone.state_dict(), model, {"image_size": subject.image_size})
            return torch_subject(LoadedNetwork(file), Origin(f"dense {model.arch}", "dense", "1"))
    return None


def _model_of(metadata: dict[str, Any]) -> Model:
    """The model section in metadata that `models.export` wrote."""
    return Model.model_validate({key: metadata[key] for key in metadata.keys() & MODEL_KEYS})


def _model_in(model: onnx.ModelProto) -> Model | None:
    """What `export` wrote to an ONNX file; None for a file of another program."""
    for prop in model.metadata_props:
        if prop.key == METADATA_KEY:
            try:
                facts = parse_json(prop.value)
                return _model_of(facts) if isinstance(facts, dict) else None
            except ValueError:
                return None
    return None


def _read_onnx(path: Path) -> onnx.ModelProto:
    try:
        return onnx.load(path)
    except (DecodeError, OSError) as error:
        raise ValueError(f"{path} is not an ONNX file: {' '.join(str(error).split())[:300]}") from None


def _onnx_image_size(model: onnx.ModelProto, path: Path) -> int:
    constants = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in constants]
    shape = [dim.dim_value or None for dim in inputs[0].type.tensor_type.shape.dim] if len(inputs) == 1 else []
    return _square(tuple(shape), path)


def _square(shape: tuple[int | None, ...], path: Path) -> int:
    """The image size of an input shape. Errors: ValueError naming `path`."""
    if len(shape) != 4 or shape[0] is not None or shape[1] != 3 or shape[2] is None or shape[2] != shape[3]:
        shown = ", ".join("any" if side is None else str(side) for side in shape)
        raise ValueError(
            f"{path} takes an input [{shown}]; expected images [any, 3, size, size] of a fixed size, as `export` writes"
        )
    return shape[2]
