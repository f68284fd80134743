"""What `launch benchmark` has measured of the networks of a report: size, multiply-accumulates, latency."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pipeline.report.benchmark_table import number_text
from pipeline.report.results import NetworkResult, RunResult
from pipeline.report.text_table import text_table
from pipeline.run.benchmark import Benchmark, BenchmarkEntry
from pipeline.run.layout import RunFolder

NOTE = "MB: 10^6 bytes; times: than the dense float32 network, not compressed, in torch; ms: one image on one thread"


def measured_entries(runs: list[RunResult]) -> Iterator[tuple[RunResult, NetworkResult, BenchmarkEntry]]:
    """Of each network that a benchmark of its run has measured as it is now, in the runs' order.

    Errors: ValueError naming a damaged benchmark.json.
    """
    for run in runs:
        benchmark = Benchmark.read_if_there(RunFolder(run.folder).benchmark)
        if benchmark is not None:
            for network in run.networks:
                for entry in benchmark.of_network(network.model_sha256):
                    yield run, network, entry


def size_and_speed_rows(runs: list[RunResult]) -> list[dict[str, Any]]:
    """One row per network, file and runtime; empty without a benchmark. Latency is of one image on one thread."""
    rows = []
    for run, network, entry in measured_entries(runs):
        latency = entry.speed(1, 1)
        rows.append(
            {
                "run": run.folder.name,
                "seed": run.recipe.seed,
                "network": network.name,
                "keep_fraction": network.keep_fraction,
                "pruned_percent": network.pruned.removesuffix(" %"),
                "file": entry.file,
                "runtime": entry.runtime,
                "precision": entry.precision,
                "bytes": entry.size,
                "compressed_bytes": entry.compressed,
                "times_smaller": entry.times_smaller,
                "weights": entry.parameters,
                "kept_weights": entry.kept_parameters,
                "macs": entry.multiply_accumulates,
                "kept_macs": entry.kept_multiply_accumulates,
                "latency_ms": latency and latency.milliseconds,
                "times_as_fast": latency and latency.times_as_fast.median,
            }
        )
    return rows


def size_and_speed_cells(runs: list[RunResult]) -> list[list[str]]:
    """The rows as text, under a header; empty without a benchmark."""
    cells = []
    for run, network, entry in measured_entries(runs):
        latency = entry.speed(1, 1)
        cells.append([network.name, network.pruned, entry.title, number_text(entry.compressed / 1e6)])
        cells[-1] += [number_text(entry.times_smaller), number_text(entry.multiply_accumulates / 1e6)]
        cells[-1] += [number_text(entry.kept_multiply_accumulates / 1e6)]
        cells[-1] += (
            [number_text(latency.milliseconds), number_text(latency.times_as_fast.median)] if latency else ["", ""]
        )
        if len(runs) > 1:
            cells[-1].insert(0, str(run.recipe.seed))
    header = ["network", "pruned", "runtime, precision", "MB gzip", "times smaller", "million MACs", "kept", "ms"]
    header.append("times as fast")
    return [[*(["seed"] if len(runs) > 1 else []), *header], *cells] if cells else []


def size_and_speed_table(runs: list[RunResult]) -> str:
    """Format as text; empty without a benchmark."""
    cells = size_and_speed_cells(runs)
    if not cells:
        return ""
    return f"{text_table(cells, left=['network', 'runtime, precision'])}\n{NOTE}"
