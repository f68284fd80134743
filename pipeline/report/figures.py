"""The report's two pictures. matplotlib is imported here and nowhere else, without pyplot: no display is needed."""

from __future__ import annotations

import math
from decimal import Decimal
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import NullLocator

from pipeline.report.comparison import NOISE, SIGNIFICANT, near_hydra
from pipeline.report.results import (
    CertifiedCurves,
    Comparisons,
    Kind,
    NetworkResult,
    RunResult,
    accuracies,
    attack_text,
    claim,
)

COLOURS = {"dense": "#444444", "HYDRA": "#0072B2", "magnitude": "#D55E00", "random": "#009E73", "SNIP": "#CC79A7"}
"""From Okabe and Ito's palette: told apart with any colour vision."""
MARKERS = {"HYDRA": "o", "magnitude": "s", "random": "^", "SNIP": "D"}
SIGNS = {"HYDRA": "●", "magnitude": "□", "random": "△", "SNIP": "◇"}
SIZES = {"HYDRA": 5, "magnitude": 10, "random": 15, "SNIP": 13}
"""Of the marks of layers, which lie on one another where the networks keep equally many connections."""
LINES = ("-", ":", "-.", (0, (5, 1, 1, 1, 1, 1)))
"""One per sparsity, from the first one on."""


class Mean(NamedTuple):
    """A number of the picture: where it stands, and from where to where its error bars go."""

    value: float
    x: float
    low: float
    high: float
    name: str


def draw_accuracy(runs: list[RunResult], comparisons: Comparisons, path: Path) -> None:
    """Robust and clean accuracy against sparsity as a PNG; bars and band are 95 % Wilson intervals.

    Several runs: every seed's point with its interval, lines and numbers through the means. A robust accuracy has a
    hollow mark where its difference from HYDRA's is within noise.
    """
    accuracy_figure(runs, comparisons).savefig(path, dpi=160)


def accuracy_figure(runs: list[RunResult], comparisons: Comparisons) -> Figure:
    figure = Figure(figsize=(10, 4.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    keeps = runs[0].recipe.sparsity.keep_fractions
    near = {(name, keep): near_hydra(runs, comparisons, name, keep) for name in runs[0].baselines for keep in keeps}
    _accuracy_panel(left, runs, "robust", near)
    _accuracy_panel(right, runs, "clean", {})
    seeds = "" if len(runs) == 1 else f"; means of {len(runs)} seeds"
    about = f"{attack_text(runs)}{seeds}; bars and bands: 95 % intervals"
    if any(any(marks) for marks in near.values()):
        about += f"\nhollow mark: {NOISE} of HYDRA (McNemar's p of {SIGNIFICANT} or more)"
    figure.suptitle(about, fontsize=10, color="#333333")
    missing = [f"{n.name} at {n.pruned} pruned" for run in runs for n in run.networks if n.evaluation is None]
    if missing:
        figure.supxlabel(f"not evaluated yet: {', '.join(dict.fromkeys(missing))}", fontsize=9, color="#333333")
    return figure


def draw_layers(run: RunResult, path: Path) -> None:
    """Kept connections of every layer at every sparsity as a PNG; the numbers beside the marks are counts."""
    networks = [n for n in run.networks if n.name != "dense" and n.layers]
    names = [str(layer["name"]) for layer in networks[0].layers] if networks else []
    figure = Figure(figsize=(10, 1.6 + 0.24 * max(len(names), 6)), layout="constrained")
    axes = figure.subplots()
    for network in networks:
        _layer_marks(axes, network)
    for keep in {n.keep_fraction: n for n in networks}.values():
        x = float(keep.keep_fraction)
        axes.axvline(x, color="#999999", linewidth=0.8, linestyle=":", zorder=0)
        above = {"xytext": (0, 3), "textcoords": "offset points", "ha": "center", "va": "bottom"}
        axes.annotate(f"{keep.pruned} pruned", (x, 1), xycoords=("data", "axes fraction"), **above)
    axes.set_yticks(range(len(names)), names, fontsize=9 if len(names) <= 20 else 7)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xscale("log")
    keeps = [float(k) for k in run.recipe.sparsity.keep_fractions]
    axes.set_xlim(max(keeps) * 2, min(keeps) / 3)  # more pruned to the right, as in the other picture
    axes.set_xticks(keeps, [f"{_percent(keep)} %" for keep in run.recipe.sparsity.keep_fractions])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("connections kept, of all in the layer (log scale)")
    done = {network.name for network in networks}
    axes.set_title("" if done else "no pruned network is finished yet", loc="left", fontsize=10)
    for column, name in enumerate(name for name in SIGNS if name in done):
        where = {"xycoords": "axes fraction", "xytext": (80 * column, 20), "textcoords": "offset points"}
        axes.annotate(f"{SIGNS[name]} {name}", (0, 1), va="bottom", color=COLOURS[name], **where)
    _strip(axes)
    figure.savefig(path, dpi=160)


def draw_certified(runs: list[RunResult], curves: CertifiedCurves, path: Path) -> None:
    """Certified accuracy of every network against the radius as a PNG; means over seeds, and for one run bands of 95 %
    intervals."""
    figure = Figure(figsize=(8, 4.8), layout="constrained")
    axes = figure.subplots()
    styles = dict(zip(runs[0].recipe.sparsity.keep_fractions, LINES, strict=False))
    for network in runs[0].networks:
        points = [curve for (_, *key), curve in curves.items() if key == [network.name, network.keep_fraction]]
        if not points:
            continue
        radii, colour = [point["radius"] for point in points[0]], COLOURS[network.name]
        means = [100 * fmean(point["value"] for point in at_radius) for at_radius in zip(*points, strict=True)]
        style = "--" if network.name == "dense" else styles.get(network.keep_fraction, ":")
        label = network.name if network.name == "dense" else f"{network.name}, {network.pruned} pruned"
        axes.plot(radii, means, color=colour, linestyle=style, linewidth=1.6, label=label)
        if len(runs) == 1:
            low, high = ([100 * point[bound] for point in points[0]] for bound in ("low", "high"))
            axes.fill_between(radii, low, high, color=colour, alpha=0.1, linewidth=0)
    threat = runs[0].recipe.threat_model
    if threat is not None:
        axes.axvline(float(threat.eps), color="#999999", linewidth=0.8, linestyle=":")
        axes.annotate(f"radius {threat.eps}", (float(threat.eps), 1), xycoords=("data", "axes fraction"), fontsize=9)
    axes.set_ylim(bottom=0)
    axes.set_xlim(left=0)
    axes.set_xlabel("l2 radius")
    axes.set_title("Certified accuracy, %", loc="left", fontsize=12, fontweight="bold", pad=14)
    axes.legend(frameon=False, loc="upper right")
    figure.suptitle(attack_text(runs), fontsize=10, color="#333333")
    axes.grid(axis="y", color="#e5e5e5", linewidth=0.8)
    _strip(axes)
    figure.savefig(path, dpi=160)


def _layer_marks(axes: Axes, network: NetworkResult) -> None:
    hydra = network.name == "HYDRA"
    for row, layer in enumerate(network.layers):
        x = layer["kept"] / layer["total"]
        axes.plot(
            x,
            row,
            MARKERS[network.name],
            color=COLOURS[network.name],
            markersize=SIZES[network.name],
            markerfacecolor=COLOURS[network.name] if hydra else "none",
        )
        if hydra:
            axes.annotate(
                f"{layer['kept']:,} of {layer['total']:,}",
                (x, row),
                xytext=(9, 0),
                textcoords="offset points",
                va="center",
                fontsize=7,
                color="#333333",
            )


def _accuracy_panel(axes: Axes, runs: list[RunResult], kind: Kind, near: dict[tuple[str, Decimal], list[bool]]) -> None:
    """`near`: which of a network's points are hollow, for those that have any."""
    keeps = sorted(runs[0].recipe.sparsity.keep_fractions, reverse=True)
    positions = {keep: -math.log10(keep) for keep in keeps}
    span = max(positions[keeps[-1]] - positions[keeps[0]], 0.5)
    ends: list[tuple[float, str, str]] = []

    dense = accuracies(runs, "dense", Decimal(1), kind)
    if dense:
        value = fmean(a["value"] for a in dense)
        low, high = min(a["low"] for a in dense), max(a["high"] for a in dense)
        axes.axhspan(100 * low, 100 * high, color=COLOURS["dense"], alpha=0.13, linewidth=0)
        axes.axhline(100 * value, color=COLOURS["dense"], linewidth=1.3, linestyle="--")
        ends.append((100 * value, f"dense {100 * value:.1f}", COLOURS["dense"]))

    names = ["HYDRA", *runs[0].baselines]
    slots = len(names) * len(runs)
    slot = min(0.024, 0.144 / slots) * span
    means: dict[Decimal, list[Mean]] = {keep: [] for keep in keeps}
    for place, name in enumerate(names):
        line: list[Mean] = []
        for keep in keeps:
            found = accuracies(runs, name, keep, kind)
            # Side by side, so that no error bar hides another: a slot for each network and seed.
            first = positions[keep] + slot * (place * len(runs) - (slots - 1) / 2)
            hollow = near.get((name, keep), [False] * len(found))
            for seed, accuracy in enumerate(found):
                _interval_mark(axes, first + slot * seed, accuracy, name, faint=len(runs) > 1, hollow=hollow[seed])
            if found:
                low, high = min(a["low"] for a in found), max(a["high"] for a in found)
                value, x = 100 * fmean(a["value"] for a in found), first + slot * (len(runs) - 1) / 2
                line.append(Mean(value, x, 100 * low, 100 * high, name))
                means[keep].append(line[-1])
        axes.plot([m.x for m in line], [m.value for m in line], color=COLOURS[name], linewidth=1.8, zorder=2)
        if line:
            ends.append((line[-1].value, name, COLOURS[name]))

    axes.set_xlim(positions[keeps[0]] - 0.18 * span, positions[keeps[-1]] + 0.18 * span)
    axes.set_xticks([positions[k] for k in keeps], [f"{_percent(1 - k)} %" for k in keeps])
    axes.set_xlabel("connections pruned (log scale of what is kept)")
    word = claim(runs) if kind == "robust" else kind
    axes.set_title(f"{word.capitalize()} accuracy, %", loc="left", fontsize=12, fontweight="bold")
    axes.margins(y=0.16)
    axes.autoscale_view()
    for beside in means.values():
        _label_means(axes, beside)
    _label_ends(axes, ends)
    axes.grid(axis="y", color="#e5e5e5", linewidth=0.8)
    axes.set_axisbelow(True)
    _strip(axes)


def _interval_mark(axes: Axes, x: float, accuracy: dict[str, float], name: str, *, faint: bool, hollow: bool) -> None:
    value = 100 * accuracy["value"]
    bars = [[value - 100 * accuracy["low"]], [100 * accuracy["high"] - value]]
    axes.errorbar(
        x,
        value,
        yerr=bars,
        fmt=MARKERS[name],
        color=COLOURS[name],
        markerfacecolor="white" if hollow else COLOURS[name],
        markersize=4 if faint else 6,
        alpha=0.55 if faint else 1.0,
        capsize=2 if faint else 4,
        linewidth=1.2,
        zorder=3,
    )


def _label_means(axes: Axes, means: list[Mean]) -> None:
    """Write the means of one sparsity beyond their error bars: above them for the best network, below for the others.

    Labels that would touch are pushed down; the axes grow with them.
    """
    low, high = axes.get_ylim()
    gap = 0.05 * (high - low)
    previous = math.inf
    for place, mean in enumerate(sorted(means, key=lambda m: (-m.value, m.x))):
        y = mean.high + 0.6 * gap if place == 0 else min(mean.low - 0.6 * gap, previous - gap)
        previous = y if place else math.inf
        low = min(low, y - gap)
        axes.annotate(
            f"{mean.value:.1f}",
            (mean.x, y),
            ha="center",
            va="center",
            color=COLOURS[mean.name],
            path_effects=[withStroke(linewidth=3, foreground="white")],
        )
    axes.set_ylim(low, high)


def _label_ends(axes: Axes, ends: list[tuple[float, str, str]]) -> None:
    """Name each line at the right edge of the axes; labels that would touch are pushed apart."""
    low, high = axes.get_ylim()
    gap = 0.055 * (high - low)
    previous = -math.inf
    for value, text, colour in sorted(ends):
        y = max(value, previous + gap)
        previous = y
        axes.annotate(
            text,
            (1.015, y),
            xycoords=("axes fraction", "data"),
            va="center",
            color=colour,
            fontsize=10,
            annotation_clip=False,
        )


def _percent(fraction: Decimal) -> str:
    return format((100 * fraction).normalize(), "f")


def _strip(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(length=3)
