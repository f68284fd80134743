"""Charts of one run: training curves, and kept connections per layer."""

from __future__ import annotations

import math
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from statistics import fmean

from matplotlib.axes import Axes

from pipeline.report.chart_style import (
    SMALL,
    Chart,
    Mark,
    figure_of,
    plot_line,
    plot_majority,
    plot_marks,
    plot_rule,
    write_png,
)
from pipeline.report.history import History
from pipeline.report.per_class import MajorityClass
from pipeline.report.results import RunResult, pruned_text
from pipeline.run.records import MetricRow

MOST_POINTS = 240
"""Per line; longer curves are averaged in groups, beyond what a screen resolves."""
ValueOf = Callable[[MetricRow], float | None]
"""Row of metrics.jsonl -> value to plot."""


def draw_layers(run: RunResult, path: Path) -> None:
    """Write kept connections per layer at every sparsity as a PNG; the numbers on the right are HYDRA's counts."""
    keeps = run.recipe.sparsity.keep_fractions
    charts = [chart for keep in keeps if (chart := layer_chart(run, keep, named=True))]
    names = [n for n in ("HYDRA", *run.baselines) if any(m.name == n and m.layers for m in run.networks)]
    rows = max([len(network.layers) for network in run.networks], default=0)
    heading = "connections kept per layer; numbers: HYDRA" if charts else "no pruned network is finished yet"
    write_png(figure_of(charts, names, heading, 1.6 + 0.24 * max(rows, 6), shared=True), path)


def training_charts(
    run: RunResult, histories: list[History], keep: Decimal, majority: MajorityClass | None = None
) -> list[Chart]:
    """Loss, accuracies and learning rate against epochs: pretraining and the stages of one sparsity.

    `majority`, of the test images, is a dotted line among the accuracies.
    """
    started = [h for h in histories if h.rows and h.stage.keep_fraction in (None, keep)]
    charts = [_training_chart(run, started, keep, "Loss", {"train": lambda row: row.loss}, 3)]
    for name in ("robust", "clean"):
        both = {kind: _percent(f"{name}_accuracy") for kind in ("train", "validation")}
        charts.append(_training_chart(run, started, keep, f"{name.capitalize()} accuracy, %", both, 3, majority))
    charts.append(_training_chart(run, started, keep, "Learning rate", {"train": lambda row: row.lr}, 2))
    return [chart for chart in charts if chart is not None]


def _training_chart(
    run: RunResult,
    started: list[History],
    keep: Decimal,
    title: str,
    kinds: dict[str, ValueOf],
    digits: int,
    majority: MajorityClass | None = None,
) -> Chart | None:
    curves, words = [], []
    for history in started:
        for kind, value_of in kinds.items():
            points = _curve(history, kind, value_of)
            if points:
                held_out = kind == "validation"
                curves.append((history.stage.title, held_out, points))
                of = " on held-out images" if held_out else ""
                first, last = points[0][1], points[-1][1]
                words.append(f"{history.stage.name}{of}: from {first:.{digits}g} to {last:.{digits}g}")
    if not curves:
        return None
    starts = {float(history.stage.first_epoch) for history in started} - {0.0}

    def paint(axes: Axes) -> None:
        for name, held_out, points in curves:
            plot_line(axes, name, *zip(*points, strict=True), held_out=held_out)
        for start in starts:
            plot_rule(axes, start)
        if majority is not None:
            plot_majority(axes, 100 * majority.share)
        axes.set_xlim(left=0)
        axes.set_xlabel("epoch")

    return Chart(title, f"{'; '.join(words)}.", paint, SMALL, f"{keep} {run.recipe.seed}")


def layer_chart(run: RunResult, keep: Decimal, *, named: bool = False) -> Chart | None:
    """Kept fraction per layer, from input (top) to output, on a logarithmic scale. `named` adds layer names on the left
    and HYDRA's counts on the right."""
    networks = [n for n in run.networks if n.name != "dense" and n.keep_fraction == keep and n.layers]
    if not networks:
        return None
    shares = {n.name: [layer.kept / layer.total for layer in n.layers] for n in networks}
    lowest = math.log10(min([share for each in shares.values() for share in each if share > 0], default=1.0))
    left = min(lowest - 0.3, -1.1)
    layers = networks[0].layers
    rows = range(1, len(layers) + 1)
    scale = 1.0 if len(layers) <= 20 else 0.6

    def paint(axes: Axes) -> None:
        for network in reversed(networks):  # HYDRA last, on top of markers at the same fraction
            x = [math.log10(share) if share > 0 else left for share in shares[network.name]]
            notes = [f"{layer.name}: {layer.kept:,} of {layer.total:,}" for layer in network.layers]
            plot_line(axes, network.name, x, rows)
            marks = [Mark(share, row, note) for share, row, note in zip(x, rows, notes, strict=True)]
            plot_marks(axes, network.name, marks, scale=scale * (1 + 0.4 * networks.index(network)))
        axes.set_xlim(left, 0.1)
        axes.set_xticks(range(math.ceil(left), 1), [f"{10.0 ** (e + 2):g} %" for e in range(math.ceil(left), 1)])
        axes.set_xlabel("fraction of the layer kept (log scale)")
        axes.set_ylim(len(layers) + 0.6, 0.4)
        axes.grid(visible=False, axis="y")
        axes.grid(axis="x")
        if not named:
            axes.set_yticks(rows[:: math.ceil(len(rows) / 10)])
            axes.set_ylabel("layer, input to output")
            return
        axes.set_yticks(rows, [layer.name for layer in layers], fontsize=9 if len(layers) <= 20 else 7)
        for row, layer in zip(rows, layers if networks[0].name == "HYDRA" else (), strict=False):
            counts, coordinates = f"{layer.kept:,} of {layer.total:,}", ("axes fraction", "data")
            axes.annotate(counts, (1.02, row), xycoords=coordinates, va="center", fontsize=7, annotation_clip=False)

    words = "; ".join(f"{name} keeps {_range(each)} of a layer" for name, each in shares.items())
    size = SMALL._replace(height=max(SMALL.height, 60 + 6.5 * len(layers)))
    return Chart(f"{pruned_text(keep)} pruned", f"{words}.", paint, size, f"layers {run.recipe.seed}")


def _percent(key: str) -> ValueOf:
    return lambda row: None if (share := getattr(row, key)) is None else 100 * share


def _curve(history: History, kind: str, value_of: ValueOf) -> list[tuple[float, float]]:
    """(epoch, value) of the rows with a value, averaged down to at most MOST_POINTS."""
    rows = [(row.epoch + history.stage.first_epoch, value_of(row)) for row in history.of_kind(kind)]
    points = [(epoch, value) for epoch, value in rows if value is not None]
    size = max(1, math.ceil(len(points) / MOST_POINTS))
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [(fmean(epoch for epoch, _ in group), fmean(value for _, value in group)) for group in groups]


def _range(shares: list[float]) -> str:
    low, high = f"{100 * min(shares):.3g} %", f"{100 * max(shares):.3g} %"
    return low if low == high else f"{low} to {high}"
