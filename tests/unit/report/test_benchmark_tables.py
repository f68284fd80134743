"""A benchmark as text and as charts, from numbers that are made up."""

from __future__ import annotations

import re
from decimal import Decimal
from pathlib import Path

import pytest

from pipeline.report.benchmark_chart import accuracy_against_cost, draw_benchmark, latency_chart, size_chart
from pipeline.report.benchmark_table import benchmark_tables, number_text
from pipeline.report.build import build_report
from pipeline.report.results import read_runs
from pipeline.report.wandb_report import report_tables
from pipeline.run.benchmark import Benchmark, BenchmarkEntry, Runtime, Speed, Spread
from pipeline.run.files import atomic_write_json
from tests.unit.report.test_report import no_pictures, read_csv, write_run

assert no_pictures  # a fixture


def made_up_entry(network: str, method: str | None, keep: str | None, file: str, runtime: Runtime) -> BenchmarkEntry:
    is_int8 = "int8" in file
    ratio = 8.0 if is_int8 else 1.0
    speeds = tuple(
        Speed(
            batch=batch,
            threads=threads,
            rounds=25,
            seconds=Spread(median=0.004 / ratio, low=0.003 / ratio, high=0.01 / ratio),
            times_as_fast=Spread(median=ratio, low=ratio, high=2 * ratio),
        )
        for batch in (1, 32)
        for threads in (1, 2)
    )
    kept = int(1000 * float(keep or 0.5))
    return BenchmarkEntry(
        network=network,
        method=method,
        keep_fraction=keep,
        model_sha256=network,
        file=file,
        sha256=f"{network} {file}",
        runtime=runtime,
        precision="int8" if is_int8 else "float32",
        size=1000 if is_int8 else 4000,
        compressed=4 * kept // (4 if is_int8 else 1),
        times_smaller=1000 / kept * (4 if is_int8 else 1),
        parameters=1000,
        kept_parameters=kept,
        multiply_accumulates=2_500_000,
        kept_multiply_accumulates=2500 * kept,
        speeds=speeds,
    )


def made_up_benchmark(*networks: tuple[str, str | None, str | None]) -> Benchmark:
    files: list[tuple[str, Runtime]] = [
        ("model.safetensors", "torch"),
        ("model-int8.onnx", "onnxruntime"),
        ("model-int8.onnx", "openvino"),
    ]
    return Benchmark(
        created="2026-11-30T21:00:00+0000",
        processor="A processor",
        cores=2,
        versions={"torch": "2.11.0"},
        image_size=28,
        reference="dense in torch, float32",
        entries=tuple(made_up_entry(*network, *file) for network in networks for file in files),
    )


RUN = made_up_benchmark(("dense", "dense", "1"), ("HYDRA, 99 % pruned", "HYDRA", "0.01"))


def test_sizes_have_a_row_per_file_and_speeds_one_per_runtime() -> None:
    sizes, speeds = (table.splitlines() for table in benchmark_tables(RUN).split("\n\n"))
    assert [line.split("  ")[0] for line in sizes[1:]] == ["dense"] * 2 + ["HYDRA, 99 % pruned"] * 2
    assert sizes[4].split()[4:] == ["model-int8.onnx", "1,000", "10", "400", "1,000", "10", "2.50", "0.0250"]
    hydra = next(line for line in speeds if "HYDRA" in line and "OpenVINO, int8" in line)
    assert hydra.split("int8")[1].split("  ")[-1].strip() == "8.00 [8.00, 16.0]"
    assert hydra.split("int8")[1].split()[0] == "0.500", "milliseconds"
    assert "64,000" in hydra, "images per second"
    assert any("A processor, 2 cores; torch 2.11.0" in line for line in speeds)


@pytest.mark.parametrize(
    ("value", "text"), [(0.01234, "0.0123"), (1.0, "1.00"), (12.34, "12.3"), (123.4, "123"), (1234.5, "1,234")]
)
def test_numbers_have_three_digits(value: float, text: str) -> None:
    assert number_text(value) == text


def test_charts_name_every_network_and_runtime(tmp_path: Path) -> None:
    assert "HYDRA, 99 % pruned, ONNX int8: 1.00e-05" in size_chart(RUN).words
    assert "HYDRA, 99 % pruned, OpenVINO int8: 0.500" in latency_chart(RUN).words
    for chart in (size_chart(RUN), latency_chart(RUN)):
        svg = chart.svg()
        assert "mark hydra" in svg
        assert "99 %" in svg
    draw_benchmark(made_up_benchmark(("dense", "dense", "1"), ("a/file.onnx", None, None)), tmp_path / "files.png")
    assert (tmp_path / "files.png").read_bytes().startswith(b"\x89PNG")


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    atomic_write_json(tmp_path / "benchmark.json", RUN.to_json())
    read = Benchmark.read(tmp_path / "benchmark.json")
    assert read == RUN
    assert [entry.runtime for entry in read.of_network("dense")] == ["torch", "onnxruntime", "openvino"]
    assert read.of_network(None) == read.of_network("another") == ()


@pytest.fixture
def measured_run(tmp_path: Path) -> Path:
    """A finished run that was benchmarked, but for one network that was trained again since."""
    folder = write_run(tmp_path / "first")
    networks = [
        (network.label, network.name, str(network.keep_fraction), network.model_sha256)
        for network in read_runs([folder])[0].networks
    ]
    benchmark = made_up_benchmark(*(network[:3] for network in networks))
    sha256_of = {label: sha256 for label, _, _, sha256 in networks} | {"magnitude, 90 % pruned": "of another"}
    entries = tuple(e.model_copy(update={"model_sha256": sha256_of[e.network]}) for e in benchmark.entries)
    atomic_write_json(folder / "benchmark.json", benchmark.model_copy(update={"entries": entries}).to_json())
    return folder


@pytest.mark.usefixtures("no_pictures")
def test_a_report_has_size_and_speed_of_the_networks_as_they_are(measured_run: Path) -> None:
    table = build_report([measured_run])
    assert re.search(r"HYDRA +99 % +ONNX Runtime, int8 +1.00e-05 +400 +2.50 +0.0250 +0.500 +8.00\n", table)
    rows = read_csv(measured_run / "report" / "deployment.csv")
    measured = {(row["network"], row["keep_fraction"]) for row in rows}
    assert measured == {("dense", "1"), ("HYDRA", "0.1"), ("HYDRA", "0.01"), ("magnitude", "0.01")}
    assert len(rows) == 3 * len(measured)
    assert (rows[-1]["runtime"], rows[-1]["latency_ms"]) == ("openvino", "0.5")
    assert (measured_run / "report" / "deployment.png").exists()
    page = (measured_run / "report" / "report.html").read_text()
    assert 'id="deployment"' in page
    assert "<td>ONNX Runtime, int8</td><td class=n>1.00e-05</td>" in page
    tables = report_tables(read_runs([measured_run])[0])
    assert len(tables["deployment"]) == len(rows)
    assert tables["deployment"][0]["keep_fraction"] == 1.0


def test_robust_accuracy_is_drawn_against_size_and_latency_of_float32_files(measured_run: Path) -> None:
    benchmark = Benchmark.read(measured_run / "benchmark.json")
    as_float = [e.model_copy(update={"precision": "float32"}) for e in benchmark.entries if e.runtime == "onnxruntime"]
    atomic_write_json(
        measured_run / "benchmark.json", benchmark.model_copy(update={"entries": tuple(as_float)}).to_json()
    )
    runs = read_runs([measured_run])
    by_size, by_latency = accuracy_against_cost(runs)
    network = runs[0].find("HYDRA", Decimal("0.01"))
    assert network is not None
    assert network.evaluation is not None
    accuracy = network.evaluation.accuracy("robust")
    value, low, high = (100 * share for share in (accuracy.value, accuracy.low, accuracy.high))
    assert f"HYDRA, 99 % pruned: {value:.2f} % [{low:.2f}, {high:.2f}], 1.00e-05" in by_size.words
    assert f"HYDRA, 99 % pruned: {value:.2f} % [{low:.2f}, {high:.2f}], 0.500" in by_latency.words
    assert "magnitude, 90 % pruned" not in by_size.words
    assert "mark dense" in by_size.svg()


@pytest.mark.usefixtures("no_pictures")
def test_without_a_benchmark_a_report_says_nothing_of_speed(tmp_path: Path) -> None:
    run = write_run(tmp_path / "first")
    assert "million MACs" not in build_report([run])
    assert not (run / "report" / "deployment.csv").exists()
    assert 'id="deployment"' not in (run / "report" / "report.html").read_text()


def test_a_damaged_benchmark_is_named(measured_run: Path) -> None:
    (measured_run / "benchmark.json").write_text('{"processor": "A processor"}')
    with pytest.raises(ValueError, match=r"benchmark.json is damaged: .*; measure again, or delete it"):
        build_report([measured_run])
