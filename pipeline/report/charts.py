"""The page's charts. Colour, line and mark are the method's; a panel is a sparsity. Seeds stand side by side."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from decimal import Decimal
from statistics import fmean
from typing import Any

from pipeline.recipe.stages import NETWORK_OF_PHASE
from pipeline.report.comparison import NOISE, Difference, near_hydra, signed
from pipeline.report.history import History
from pipeline.report.results import (
    CertifiedCurves,
    Comparisons,
    Kind,
    RunResult,
    accuracies,
    claim,
    pruned_text,
)
from pipeline.report.svg import LINE_HEIGHT, Axis, Chart, Label, Level, Point, Series, draw, nice_axis

MOST_POINTS = 240
"""Of one line; more rows are averaged in groups, as no screen shows them."""
SMALL = (300.0, 200.0)
NEAR = f", {NOISE} of HYDRA"


def accuracy_chart(runs: list[RunResult], comparisons: Comparisons, kind: Kind) -> Chart:
    """Accuracy against sparsity, with 95 % intervals; several seeds side by side, the line through their means.

    A robust accuracy has a hollow mark where its difference from HYDRA's is within noise.
    """
    keeps = sorted(runs[0].recipe.sparsity.keep_fractions, reverse=True)
    where = {keep: -math.log10(keep) for keep in keeps}
    span = max(where[keeps[-1]] - where[keeps[0]], 0.5)
    names = ["HYDRA", *runs[0].baselines]
    slot = min(0.035, 0.3 / (len(names) * len(runs))) * span
    series, levels, said = [], [], []
    means: dict[Decimal, list[tuple[str, Point]]] = {keep: [] for keep in keeps}
    if dense := accuracies(runs, "dense", Decimal(1), kind):
        levels = [Level("dense", 100 * fmean(a["value"] for a in dense), *_bounds(dense))]
        said.append(f"dense {levels[0].value:.1f} %")
    for place, name in enumerate(names):
        for keep in keeps:
            first = where[keep] + slot * (place * len(runs) - (len(names) * len(runs) - 1) / 2)
            found = accuracies(runs, name, keep, kind)
            near = near_hydra(runs, comparisons, name, keep) if kind == "robust" else [False] * len(found)
            what = f"{name}, {pruned_text(keep)} pruned"
            seeds = [
                _accuracy_point(a, first + slot * i, what, NEAR if hollow else "")
                for i, (a, hollow) in enumerate(zip(found, near, strict=True))
            ]
            if not seeds:
                continue
            for style, hollow in ((name.lower(), False), (f"{name.lower()} noise", True)):
                marked = [point for point, one in zip(seeds, near, strict=True) if one == hollow]
                if marked:
                    series.append(Series(style, marked, line=False, faint=len(runs) > 1))
            middle = first + slot * (len(runs) - 1) / 2
            means[keep].append((name, Point(middle, fmean(p.y for p in seeds), *_bounds(found))))
            of = "" if len(runs) == 1 else f" in {sum(near)} of {len(near)} seeds"
            said.append(f"{name} {means[keep][-1][1].y:.1f} % at {pruned_text(keep)} pruned")
            said[-1] += f"{NEAR}{of}" if any(near) else ""
        line = [Point(point.x, point.y) for keep in keeps for other, point in means[keep] if other == name]
        series.append(Series(name.lower(), line, marks=False))
    values = [v for s in series for p in s.points for v in (p.low, p.high) if v is not None]
    y = nice_axis([*values, *(v for level in levels for v in (level.low, level.high))], pad=0.16)
    edge = 0.2 * span
    ticks = tuple((where[keep], pruned_text(keep)) for keep in keeps)
    x = Axis(where[keeps[0]] - edge, where[keeps[-1]] + edge, ticks, "connections pruned (log scale of what is kept)")
    word = claim(runs) if kind == "robust" else kind
    labels = [label for beside in means.values() for label in _numbers(beside, y)]
    says = f"{'; '.join(said) or 'nothing is evaluated yet'}."
    return draw(f"{word.capitalize()} accuracy, %", series, x, y, says=says, levels=levels, labels=labels)


def difference_chart(found: Sequence[Difference], runs: list[RunResult]) -> Chart | None:
    """HYDRA's lead over its baselines with 95 % intervals, around the line of no difference."""
    there = [d for d in found if d.test is not None]
    if not there:
        return None
    points: dict[str, list[Point]] = {}
    groups: dict[Decimal, list[int]] = {}
    said = []
    for place, one in enumerate(there):
        assert one.test is not None
        lead = 100 * one.test.difference
        note = f"{pruned_text(one.keep_fraction)} pruned, over {one.baseline}: {signed(lead, 2)} points, {one.says}"
        style = f"{one.baseline.lower()}{' noise' if one.says == NOISE else ''}"
        points.setdefault(style, []).append(Point(place, lead, 100 * one.low, 100 * one.high, note))
        groups.setdefault(one.keep_fraction, []).append(place)
        said.append(note)
    series = [Series(style, each, line=False) for style, each in points.items()]
    ticks = tuple((fmean(places), pruned_text(keep)) for keep, places in groups.items())
    x = Axis(-0.6, len(there) - 0.4, ticks, "connections pruned")
    between = [places[0] - 0.5 for places in groups.values() if places[0] > 0]
    y = nice_axis([0.0, *(v for each in points.values() for p in each for v in (p.low or 0.0, p.high or 0.0))], pad=0.1)
    says = f"Points of {claim(runs)} accuracy: {'; '.join(said)}."
    return draw("HYDRA's lead, points", series, x, y, says=says, levels=[Level("zero", 0.0, 0.0, 0.0)], rules=between)


def certified_charts(runs: list[RunResult], curves: CertifiedCurves) -> list[Chart]:
    """Certified accuracy against the radius, a chart per sparsity, each with the dense network; means over seeds."""
    charts = []
    for keep in runs[0].recipe.sparsity.keep_fractions if curves else ():
        series = []
        for network in runs[0].networks:
            if network.name != "dense" and network.keep_fraction != keep:
                continue
            same = [points for (_, *key), points in curves.items() if key == [network.name, network.keep_fraction]]
            if same:
                series.append(Series(network.name.lower(), _mean_curve(same), marks=False, band=len(same) == 1))
        points = [point for s in series for point in s.points]
        y = nice_axis([0.0, *(p.high if p.high is not None else p.y for p in points)], pad=0)
        x = nice_axis([p.x for p in points], "l2 radius", pad=0)
        says = f"Networks: {', '.join(s.style for s in series)}."
        charts.append(draw(f"Certified accuracy, %, {pruned_text(keep)} pruned", series, x, y, says=says))
    return charts


def training_charts(run: RunResult, histories: list[History], keep: Decimal) -> list[Chart]:
    """Loss, accuracies and learning rate against epochs: pretraining, and what follows at one sparsity."""
    there = [h for h in histories if h.rows and h.stage.keep_fraction in (None, keep)]
    if not there:
        return []
    rules = sorted({float(h.stage.first_epoch) for h in there} - {0.0})
    ends = [h.stage.first_epoch + h.rows[-1]["epoch"] for h in there]
    x = nice_axis([0.0, *ends], "epoch", pad=0)

    def chart(name: str, kinds: dict[str, Callable[[dict[str, Any]], float | None]], digits: int) -> Chart | None:
        series, said = [], []
        for history in there:
            for kind, value_of in kinds.items():
                points = _curve(history, kind, value_of)
                style = NETWORK_OF_PHASE[history.stage.phase].lower()
                if not points:
                    continue
                held_out = kind == "validation"
                shown = Series(f"{style} held-out" if held_out else style, points, marks=held_out)
                series.append(shown)
                of = " on held-out images" if held_out else ""
                said.append(f"{history.stage.name}{of}: from {points[0].y:.{digits}g} to {points[-1].y:.{digits}g}")
        if not series:
            return None
        y = nice_axis([p.y for s in series for p in s.points], pad=0.05)
        return draw(name, series, x, y, says=f"{'; '.join(said)}.", rules=rules, size=SMALL)

    def percent(key: str) -> Callable[[dict[str, Any]], float | None]:
        return lambda row: None if row.get(key) is None else 100 * row[key]

    charts = [chart("Loss", {"train": lambda row: row["loss"]}, 3)]
    for name in ("robust", "clean"):
        both = {kind: percent(f"{name}_accuracy") for kind in ("train", "validation")}
        charts.append(chart(f"{name.capitalize()} accuracy, %", both, 3))
    charts.append(chart("Learning rate", {"train": lambda row: row["lr"]}, 2))
    return [one for one in charts if one is not None]


def layer_chart(run: RunResult, keep: Decimal) -> Chart | None:
    """Kept connections of every layer, from input to output, on a logarithmic scale."""
    networks = [n for n in run.networks if n.name != "dense" and n.keep_fraction == keep and n.layers]
    if not networks:
        return None
    series, lowest = [], 1.0
    for network in networks:
        shares = [(layer, layer["kept"] / layer["total"]) for layer in network.layers]
        lowest = min([lowest, *(share for _, share in shares if share > 0)])
        points = [
            Point(i, math.log10(max(share, 1e-6)), note=f"{layer['name']}: {layer['kept']:,} of {layer['total']:,}")
            for i, (layer, share) in enumerate(shares, 1)
        ]
        series.append(Series(network.name.lower(), points))
    bottom = min(math.log10(lowest) - 0.3, -1.1)
    y = Axis(bottom, 0.1, tuple((float(e), f"{10.0 ** (e + 2):g} %") for e in range(math.ceil(bottom), 1)))
    count = len(networks[0].layers)
    step = max(1, math.ceil(count / 10))
    x = Axis(0.5, count + 0.5, tuple((float(i), str(i)) for i in range(1, count + 1, step)), "layer, input to output")
    said = [f"{n.name} keeps {_range([la['kept'] / la['total'] for la in n.layers])} of a layer" for n in networks]
    # HYDRA last, on top: where every layer has the same share, marks coincide.
    return draw(f"{pruned_text(keep)} pruned", series[::-1], x, y, says=f"{'; '.join(said)}.", size=SMALL)


def _accuracy_point(accuracy: dict[str, float], x: float, what: str, more: str) -> Point:
    value, low, high = (100 * accuracy[part] for part in ("value", "low", "high"))
    return Point(x, value, low, high, f"{what}: {value:.2f} % [{low:.2f}, {high:.2f}]{more}")


def _bounds(found: list[dict[str, float]]) -> tuple[float, float]:
    return 100 * min(a["low"] for a in found), 100 * max(a["high"] for a in found)


def _numbers(beside: list[tuple[str, Point]], y: Axis) -> list[Label]:
    """The means of one sparsity: above its interval for the best network, below theirs for the others."""
    labels, lowest = [], math.inf
    unit = (y.high - y.low) / 180  # about a unit of the drawing
    for place, (name, point) in enumerate(sorted(beside, key=lambda item: -item[1].y)):
        assert point.low is not None
        assert point.high is not None
        text = f"{point.y:.1f}"
        if place == 0:
            labels.append(Label(name.lower(), point.x, point.high, text, 5.0))
            continue
        base = min(point.low, lowest)
        labels.append(Label(name.lower(), point.x, base, text, -LINE_HEIGHT))
        lowest = base - LINE_HEIGHT * unit
    return labels


def _mean_curve(same: list[list[dict[str, float]]]) -> list[Point]:
    points = []
    for at_radius in zip(*same, strict=True):
        low, high = (100 * at_radius[0][bound] for bound in ("low", "high"))
        points.append(Point(at_radius[0]["radius"], 100 * fmean(p["value"] for p in at_radius), low, high))
    return points


def _curve(history: History, kind: str, value_of: Callable[[dict[str, Any]], float | None]) -> list[Point]:
    rows = history.of_kind(kind)
    found = [(row["epoch"] + history.stage.first_epoch, value) for row in rows if (value := value_of(row)) is not None]
    size = max(1, math.ceil(len(found) / MOST_POINTS))
    groups = [found[start : start + size] for start in range(0, len(found), size)]
    return [Point(fmean(x for x, _ in group), fmean(y for _, y in group)) for group in groups]


def _range(shares: list[float]) -> str:
    low, high = f"{100 * min(shares):.3g} %", f"{100 * max(shares):.3g} %"
    return low if low == high else f"{low} to {high}"
