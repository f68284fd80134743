"""`benchmark`: of a run and of files, with few rounds; times themselves are not tested."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch.__main__ import main
from pipeline.run.benchmark import Benchmark
from pipeline.run.files import sha256_of
from tests.support.finished_run import write_finished_run
from tests.support.small_recipe import small_recipe


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A finished run, whose data are gone."""
    monkeypatch.chdir(tmp_path)
    for name, value in {"FEWEST_ROUNDS": 2, "MOST_ROUNDS": 2, "SAMPLE_S": 0.0001}.items():
        monkeypatch.setattr(f"pipeline.deployment.alternation.{name}", value)
    monkeypatch.setattr("pipeline.deployment.subjects.load_openvino", lambda: None)
    recipe = small_recipe(tmp_path, sparsity={"keep_fractions": ["0.5", "0.1"], "baselines": ["magnitude"]})
    return write_finished_run(tmp_path / "runs" / "demo", recipe)


@pytest.mark.slow
def test_a_runs_networks_are_measured_beside_the_dense_one(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["benchmark", "demo", "--keep", "0.10", "--method", "magnitude"]) == 0
    benchmark = Benchmark.read(run / "benchmark.json")
    assert (run / "benchmark.png").read_bytes().startswith(b"\x89PNG")
    files = {"dense": run / "pretrain", "magnitude": run / "keep-0.1" / "magnitude"}
    assert {entry.method for entry in benchmark.entries} == files.keys()
    for name, folder in files.items():
        entries = benchmark.of_network(sha256_of(folder / "model.safetensors"))
        assert [(entry.file, entry.runtime, entry.precision) for entry in entries] == [
            ("model.safetensors", "torch", "float32"),
            ("model.onnx", "onnxruntime", "float32"),
            ("model-int8.onnx", "onnxruntime", "int8"),
        ]
        assert {entry.keep_fraction for entry in entries} == {"1" if name == "dense" else "0.1"}
        assert all(entry.speed(1, 1) and entry.speed(32, benchmark.cores) for entry in entries)
    assert benchmark.reference == "dense in torch, float32, channels-last"
    assert benchmark.entries[0].times_smaller == pytest.approx(1, abs=0.2)
    out = capsys.readouterr().out
    for text in (
        "magnitude, 90 % pruned",
        "ONNX Runtime, int8",
        "model-int8.onnx",
        "ms, 1 thread",
        benchmark.processor,
    ):
        assert text in out


@pytest.mark.slow
def test_files_are_compared_with_the_dense_network_of_their_architecture(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = run / "keep-0.1" / "finetune" / "model.safetensors"
    assert main(["export", str(file), "--format", "onnx", "torch", "--out", "files"]) == 0
    assert main(["benchmark", "files/model.pt2", "files/model.onnx", "--json", "speed.json"]) == 0
    benchmark = Benchmark.read(tmp_path / "speed.json")
    assert [(entry.network, entry.method, entry.runtime) for entry in benchmark.entries] == [
        ("dense small_cnn", "dense", "torch"),
        ("files/model.pt2", None, "torch"),
        ("files/model.onnx", None, "onnxruntime"),
    ]
    assert (tmp_path / "speed.png").exists()
    assert not (run / "benchmark.json").exists()
    assert "times as fast: than dense small_cnn in torch" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo", "model.onnx"], "give one run, or only files"),
        (["demo", "other"], "give one run, or only files"),
        (["none.onnx"], "none.onnx does not exist"),
        (["nowhere"], "nowhere: no such run; runs here: demo"),
        (["demo", "--keep", "0.2"], "--keep 0.2: {run} has no such network; there is 0.5, 0.1"),
        (["demo", "--method", "snip"], "--method snip: {run} has no such network; there is hydra, magnitude"),
        (["empty.onnx", "--method", "snip"], "--method snip selects networks of a run, and empty.onnx is a file"),
        (["empty.onnx"], "empty.onnx takes an input []; expected images [any, 3, size, size]"),
        (["demo", "--json", "speed.txt"], "--json speed.txt: give a name that ends in .json"),
        (["demo", "--json", "nowhere/speed.json"], "--json nowhere/speed.json: give a name"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    run: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    Path("empty.onnx").touch()
    assert main(["benchmark", *arguments]) == 2
    assert message.format(run=run.relative_to(Path.cwd())) in capsys.readouterr().err
    assert not (run / "benchmark.json").exists()


def test_a_run_without_its_dense_network_has_nothing_to_compare_with(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / "pretrain" / "result.json").unlink()
    assert main(["benchmark", "demo"]) == 2
    assert "has no finished dense network yet; continue with" in capsys.readouterr().err
