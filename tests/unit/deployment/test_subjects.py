"""Files are read as what they are: size, cost, precision; what is no such file is refused by name."""

from __future__ import annotations

import gzip
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from pipeline.deployment import subjects as module
from pipeline.deployment.benchmark import run_benchmark
from pipeline.deployment.subjects import (
    Origin,
    Subject,
    dense_reference,
    file_subjects,
    network_subjects,
    torch_subject,
)
from pipeline.deployment.torch_program import write_program
from pipeline.evaluation.load import LoadedNetwork
from pipeline.models.cost import Cost, network_cost
from pipeline.models.export import write_model
from pipeline.models.state import effective_state
from pipeline.recipe.sections import Model
from tests.unit.deployment.test_export import pruned_network

MODEL = Model(arch="small_cnn", num_classes=10, mean=(0.3, 0.4, 0.5), std=(0.2, 0.3, 0.25))
ORIGIN = Origin("it")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model.safetensors with 10 % of its connections, its ONNX files as a benchmark makes them, and its program."""
    folder = tmp_path_factory.mktemp("subjects")
    network = pruned_network("small_cnn", 28)
    write_model(folder / "model.safetensors", effective_state(network), MODEL, {"image_size": 28})
    network_subjects(LoadedNetwork(folder / "model.safetensors"), ORIGIN, folder)
    write_program(network, 28, folder / "model.pt2")
    return folder


def only(path: Path) -> Subject:
    """The file in torch or ONNX Runtime."""
    if path.suffix == ".safetensors":
        return torch_subject(LoadedNetwork(path), ORIGIN)
    return next(s for s in file_subjects(path, ORIGIN, path.parent) if s.runtime != "openvino")


def test_every_file_has_the_cost_of_its_network(folder: Path) -> None:
    expected = network_cost(LoadedNetwork(folder / "model.safetensors"), 28)
    assert expected.kept_parameters == pytest.approx(expected.parameters / 10, rel=1e-3)
    assert only(folder / "model.onnx").cost == expected
    assert only(folder / "model.pt2").cost == expected
    int8 = only(folder / "model-int8.onnx").cost
    assert (int8.parameters, int8.multiply_accumulates) == (expected.parameters, expected.multiply_accumulates)
    assert 0.9 * expected.kept_parameters < int8.kept_parameters <= expected.kept_parameters, "some round to zero"
    assert int8.kept_multiply_accumulates <= expected.kept_multiply_accumulates


def test_sizes_are_those_of_the_file_and_of_its_compressed_copy(folder: Path) -> None:
    content = (folder / "model-int8.onnx").read_bytes()
    sizes = only(folder / "model-int8.onnx").sizes
    assert (sizes.name, sizes.size) == ("model-int8.onnx", len(content))
    assert sizes.compressed == len(gzip.compress(content, 9)) < sizes.size / 3


def test_runtime_and_precision_are_named(folder: Path) -> None:
    found = {(s.runtime, s.precision) for s in map(only, folder.iterdir())}
    assert found == {("torch", "float32"), ("onnxruntime", "float32"), ("onnxruntime", "int8")}


def test_openvino_is_measured_in_the_precision_that_it_chooses(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of OpenVINO, which is an extra: what it would be asked."""

    class Core:
        def compile_model(self, path: Path, device: str, options: dict[str, Any] | None = None) -> Any:
            assert device == "CPU"
            hint = SimpleNamespace(to_string=lambda: "bf16")
            return SimpleNamespace(get_property={"INFERENCE_PRECISION_HINT": hint}.__getitem__)

    monkeypatch.setattr(module, "load_openvino", lambda: SimpleNamespace(Core=Core))
    precisions = {}
    for name in ("model.onnx", "model-int8.onnx"):
        subjects = file_subjects(folder / name, ORIGIN, folder)
        precisions[name] = [s.precision for s in subjects if s.runtime == "openvino"]
    assert precisions == {"model.onnx": ["bfloat16"], "model-int8.onnx": ["int8, rest bfloat16"]}


@pytest.mark.parametrize("name", ["model.safetensors", "model.onnx", "model.pt2"])
def test_opened_files_compute_the_networks_logits(folder: Path, name: str) -> None:
    images = np.random.default_rng(0).random((3, 3, 28, 28), np.float32)
    with torch.inference_mode():
        expected = LoadedNetwork(folder / "model.safetensors")(torch.from_numpy(images)).numpy()
    logits: Any = only(folder / name).opener(1)(images)()
    np.testing.assert_allclose(np.asarray(logits).reshape(3, 10), expected, atol=1e-4)


def test_the_reference_is_the_dense_network_of_the_first_architecture_that_is_named(
    folder: Path, tmp_path: Path
) -> None:
    program, float_file = only(folder / "model.pt2"), only(folder / "model.onnx")
    foreign = onnx.load(folder / "model.onnx")
    foreign.metadata_props[0].value = "no JSON"
    onnx.save(foreign, tmp_path / "foreign.onnx")
    assert dense_reference([program, only(tmp_path / "foreign.onnx")], tmp_path) is None
    reference = dense_reference([program, float_file], tmp_path)
    assert reference is not None
    assert (reference.origin.network, reference.runtime) == ("dense small_cnn", "torch")
    assert reference.cost.kept_parameters == reference.cost.parameters == float_file.cost.parameters


def test_what_cannot_be_read_is_refused_by_name(folder: Path, tmp_path: Path) -> None:
    for name, text in {
        "a.onnx": "is not an ONNX file",
        "a.pt2": "is not a torch.export",
        "a.safetensors": "damaged",
    }.items():
        (tmp_path / name).write_bytes(b"nothing of the kind")
        with pytest.raises(ValueError, match=f"{name}.*{text}"):
            file_subjects(tmp_path / name, ORIGIN, tmp_path)


def test_a_file_for_another_input_is_refused(folder: Path, tmp_path: Path) -> None:
    model = onnx.load(folder / "model.onnx")
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 4
    onnx.save(model, tmp_path / "four.onnx")
    with pytest.raises(ValueError, match=r"four.onnx takes an input \[4, 3, 28, 28\]; expected images \[any, 3, "):
        only(tmp_path / "four.onnx")


def made_up(name: str, seconds: float, clock: list[float], image_size: int = 28) -> Subject:
    """A subject whose calls take `seconds` of a clock that only they advance, whatever the threads."""

    def call() -> None:
        clock[0] += seconds

    cost = Cost(100, 10, 1000, 50)
    sizes = module.Sizes(f"{name}.onnx", "0" * 64, 4000, 500)
    return Subject(Origin(name), "onnxruntime", "float32", sizes, cost, image_size, lambda _: lambda _: call)


def test_a_benchmark_compares_with_the_first_subject(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, told, threads = [0.0], [], torch.get_num_threads()
    monkeypatch.setattr("pipeline.deployment.benchmark.CLOCKS", {False: lambda: clock[0], True: lambda: clock[0]})
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1, 2})
    made = [made_up("slow", 0.08, clock), made_up("fast", 0.02, clock)]
    benchmark = run_benchmark(made, lambda what, done, total: told.append(what))
    assert list(dict.fromkeys(told)) == [
        "batch 1, 1 thread",
        "batch 32, 1 thread",
        "batch 1, 3 threads",
        "batch 32, 3 threads",
    ]
    assert (benchmark.cores, benchmark.reference) == (3, "slow in ONNX Runtime, float32")
    slow, fast = benchmark.entries
    assert (fast.times_smaller, fast.kept_multiply_accumulates) == (8.0, 50)
    assert {(s.batch, s.threads) for s in fast.speeds} == {(1, 1), (32, 1), (1, 3), (32, 3)}
    for of_slow, of_fast in zip(slow.speeds, fast.speeds, strict=True):
        assert of_slow.times_as_fast.median == of_slow.times_as_fast.high == 1
        assert of_fast.times_as_fast.median == pytest.approx(4)
        assert of_fast.seconds.median == pytest.approx(0.02)
    latency, throughput = fast.speed(1, 1), fast.speed(32, 1)
    assert latency is not None
    assert throughput is not None
    assert (latency.milliseconds, throughput.images_per_s) == (pytest.approx(20), pytest.approx(1600))
    assert torch.get_num_threads() == threads


def test_images_of_two_sizes_are_not_compared() -> None:
    clock = [0.0]
    with pytest.raises(ValueError, match="large takes images of 32 pixels and small of 28; their speeds cannot"):
        run_benchmark([made_up("small", 1, clock), made_up("large", 1, clock, 32)], lambda *_: None)
