"""A benchmark as text: sizes and costs of files, and speeds, as ratios to the reference."""

from __future__ import annotations

from pipeline.report.text_table import text_table
from pipeline.run.benchmark import Benchmark, BenchmarkEntry, Speed, Spread


def benchmark_tables(benchmark: Benchmark) -> str:
    """The two tables, and in what circumstances they were measured."""
    versions = ", ".join(f"{name} {version}" for name, version in benchmark.versions.items())
    cores = f"{benchmark.cores} core{'s' if benchmark.cores > 1 else ''}"
    rounds = sorted({speed.rounds for entry in benchmark.entries for speed in entry.speeds})
    notes = [
        f"times smaller: gzip, than the file of {benchmark.reference}, as it is",
        f"times as fast: than {benchmark.reference}; median [lowest, highest] of "
        f"{' to '.join(map(str, dict.fromkeys((rounds[0], rounds[-1]))))} rounds, in which all ran in turn",
        f"MACs: multiply-accumulates per image of {benchmark.image_size} pixels; kept: of weights that are not zero",
        "one thread: CPU time, which other load disturbs less; several: wall-clock time",
        f"{benchmark.processor}, {cores}; {versions}",
    ]
    return "\n".join([size_table(benchmark), "", speed_table(benchmark), *notes])


def size_table(benchmark: Benchmark) -> str:
    """One row per file."""
    rows = [["network", "file", "bytes", "gzip", "times smaller", "weights", "kept", "million MACs", "kept"]]
    for entry in benchmark.files:
        cells = [f"{entry.size:,}", f"{entry.compressed:,}", number_text(entry.times_smaller)]
        cells += [f"{entry.parameters:,}", f"{entry.kept_parameters:,}"]
        macs = (entry.multiply_accumulates, entry.kept_multiply_accumulates)
        rows.append([entry.network, entry.file, *cells, *(number_text(count / 1e6) for count in macs)])
    return text_table(rows, left=["network", "file"])


def speed_table(benchmark: Benchmark) -> str:
    """One row per file and runtime: milliseconds for one image, images per second in larger batches."""
    places = dict.fromkeys((speed.batch, speed.threads) for entry in benchmark.entries for speed in entry.speeds)
    header = ["network", "runtime, precision"]
    for batch, threads in sorted(places):
        header += [f"{_unit(batch)}, {threads} thread{'s' if threads > 1 else ''}", "times as fast"]
    rows = [header]
    for entry in benchmark.entries:
        rows.append([entry.network, entry.title])
        for batch, threads in sorted(places):
            rows[-1] += _speed_cells(entry, batch, threads)
    return text_table(rows, left=["network", "runtime, precision"])


def number_text(value: float) -> str:
    """Three digits: 0.0123, 1.23, 12.3, 1,234."""
    return f"{value:,.0f}" if value >= 100 else f"{value:#.3g}"


def _speed_cells(entry: BenchmarkEntry, batch: int, threads: int) -> list[str]:
    speed = entry.speed(batch, threads)
    if speed is None:
        return ["", ""]
    return [number_text(_value(speed)), _spread_text(speed.times_as_fast)]


def _unit(batch: int) -> str:
    return "ms" if batch == 1 else f"images/s at {batch}"


def _value(speed: Speed) -> float:
    return speed.milliseconds if speed.batch == 1 else speed.images_per_s


def _spread_text(spread: Spread) -> str:
    return f"{number_text(spread.median)} [{number_text(spread.low)}, {number_text(spread.high)}]"
