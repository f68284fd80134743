"""Charts of a benchmark: size of files and latency per runtime, and robust accuracy against both."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from decimal import Decimal
from pathlib import Path
from statistics import fmean

from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullFormatter

from pipeline.report.benchmark_table import number_text
from pipeline.report.chart_style import Chart, Mark, figure_of, plot_marks, plot_rule, write_png
from pipeline.report.method_style import OTHER
from pipeline.report.results import NetworkResult, RunResult, attack_text, claim, pruned_text
from pipeline.report.size_and_speed import measured_entries
from pipeline.run.benchmark import Benchmark, BenchmarkEntry

Entries = Sequence[BenchmarkEntry]
GAP = 1.5
"""Between groups of marks, in marks."""
NARROWEST = 4.0
"""Largest / smallest value on an axis of sizes or times, at least: noise does not fill it."""


def draw_benchmark(benchmark: Benchmark, path: Path) -> None:
    """Write size and latency as a PNG; see `size_chart`, `latency_chart`."""
    names = list(dict.fromkeys(entry.method or OTHER for entry in benchmark.entries))
    heading = f"{benchmark.processor}; bars: lowest and highest of the rounds; {benchmark.reference} is the reference"
    write_png(figure_of([size_chart(benchmark), latency_chart(benchmark)], names, heading, 4.8), path)


def size_chart(benchmark: Benchmark) -> Chart:
    """Compressed bytes per kind of file."""
    return _chart(
        "Compressed file, MB",
        benchmark.files,
        lambda entry: f"{'torch' if entry.runtime == 'torch' else 'ONNX'}\n{entry.precision.partition(',')[0]}",
        lambda entry: (entry.compressed / 1e6, entry.compressed / 1e6, entry.compressed / 1e6),
    )


def latency_chart(benchmark: Benchmark) -> Chart:
    """Milliseconds for one image on one thread, per runtime."""

    def values(entry: BenchmarkEntry) -> tuple[float, float, float]:
        speed = entry.speed(1, 1)
        assert speed is not None
        seconds = speed.seconds
        return 1e3 * seconds.median, 1e3 * seconds.low, 1e3 * seconds.high

    measured = [entry for entry in benchmark.entries if entry.speed(1, 1) is not None]
    return _chart("One image on one thread, ms", measured, lambda entry: entry.title.replace(", ", "\n"), values)


def draw_accuracy_against_cost(runs: list[RunResult], path: Path) -> None:
    """Write robust accuracy against size and latency as a PNG; see `accuracy_against_cost`."""
    names = ["dense", "HYDRA", *runs[0].baselines]
    write_png(figure_of(accuracy_against_cost(runs), names, attack_text(runs), 4.8, shared=True), path)


def accuracy_against_cost(runs: list[RunResult]) -> list[Chart]:
    """Robust accuracy of networks against their compressed size, and against their latency; empty without a benchmark.

    Of the ONNX files in float32, which compute what the evaluated networks compute. An int8 file is another
    classifier, whose accuracy is not the network's.
    """
    found = [
        (network, entry, latency)
        for _, network, entry in measured_entries(runs)
        if (entry.runtime, entry.precision) == ("onnxruntime", "float32")
        and network.evaluation is not None
        and (latency := entry.speed(1, 1)) is not None
    ]
    if not found:
        return []
    by_size = [(network, entry.compressed / 1e6) for network, entry, _ in found]
    by_latency = [(network, latency.milliseconds) for network, _, latency in found]
    word = claim(runs)
    return [
        _against(f"{word.capitalize()} accuracy, %, and size", "compressed ONNX file, float32, MB", by_size),
        _against(
            f"{word.capitalize()} accuracy, %, and latency", "one image, one thread, ONNX Runtime, ms", by_latency
        ),
    ]


def _against(title: str, label: str, points: list[tuple[NetworkResult, float]]) -> Chart:
    marks: dict[str, list[Mark]] = {}
    for network, x in points:
        assert network.evaluation is not None
        accuracy = network.evaluation.accuracy("robust")
        value, low, high = (100 * share for share in (accuracy.value, accuracy.low, accuracy.high))
        note = f"{network.label}: {value:.2f} % [{low:.2f}, {high:.2f}], {number_text(x)}"
        marks.setdefault(network.name, []).append(Mark(x, value, note, low, high))
    notes = [mark.note for of_method in marks.values() for mark in of_method]

    def paint(axes: Axes) -> None:
        log_scale(axes, "x")
        for name, of_method in marks.items():
            plot_marks(axes, name, of_method)
        axes.set_xlabel(label)
        axes.margins(y=0.12)
        low, high = min(x for _, x in points), max(x for _, x in points)
        room = max(NARROWEST / (high / low), (high / low) ** 0.24) ** 0.5
        axes.set_xlim(low / room, high * room)

    return Chart(title, f"{label}: {'; '.join(notes)}.", paint)


def log_scale(axes: Axes, which: str) -> None:
    """A logarithmic axis ("x" or "y") whose ticks are plain numbers."""
    axis = axes.xaxis if which == "x" else axes.yaxis
    getattr(axes, f"set_{which}scale")("log")
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def _chart(
    title: str,
    entries: Entries,
    group_of: Callable[[BenchmarkEntry], str],
    values: Callable[[BenchmarkEntry], tuple[float, float, float]],
) -> Chart:
    """Values (median, lowest, highest) on a logarithmic axis, grouped; ticks are the share that is pruned."""
    marks: dict[str, list[Mark]] = {}
    ticks: list[tuple[float, str]] = []
    groups: list[tuple[float, str]] = []
    rules: list[float] = []
    words: list[str] = []
    place = 0.0
    for group in dict.fromkeys(map(group_of, entries)):
        first = place
        places: dict[str, list[float]] = {}
        for entry in (entry for entry in entries if group_of(entry) == group):
            value, low, high = values(entry)
            note = f"{entry.network}, {group.replace(chr(10), ' ')}: {number_text(value)}"
            marks.setdefault(entry.method or OTHER, []).append(Mark(place, value, note, low, high))
            places.setdefault(_pruned_text(entry), []).append(place)
            words.append(note)
            place += 1
        ticks += [(fmean(where), text) for text, where in places.items()]
        groups.append(((first + place - 1) / 2, group))
        place += GAP
        rules.append(place - 1 - GAP / 2)

    def paint(axes: Axes) -> None:
        log_scale(axes, "y")
        for name, points in marks.items():
            plot_marks(axes, name, points)
        for x in rules[:-1]:
            plot_rule(axes, x)
        axes.set_xlim(-1, place - GAP)
        axes.xaxis.remove_overlapping_locs = False  # of a group's name and its middle network
        axes.set_xticks([x for x, _ in ticks], [text for _, text in ticks], minor=True)
        axes.set_xticks([x for x, _ in groups], [f"\n{text}" for _, text in groups])
        axes.tick_params(axis="x", which="minor", length=0, labelsize="x-small")
        axes.tick_params(axis="x", which="major", length=0, labelsize="small")
        axes.margins(y=0.12)

    return Chart(title, f"{'; '.join(words)}.", paint)


def _pruned_text(entry: BenchmarkEntry) -> str:
    if entry.keep_fraction is not None:
        return pruned_text(Decimal(entry.keep_fraction))
    return f"{100 * (1 - entry.kept_parameters / max(entry.parameters, 1)):.3g} %"
