"""A benchmark as text and as charts, from numbers that are made up."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.report.benchmark_chart import draw_benchmark, latency_chart, size_chart
from pipeline.report.benchmark_table import benchmark_tables, number_text
from pipeline.run.benchmark import Benchmark, BenchmarkEntry, Runtime, Speed, Spread
from pipeline.run.files import atomic_write_json


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
