"""Charts of results: accuracy against sparsity, HYDRA's lead, certified accuracy against radius.

The page shows each chart separately, a PNG puts charts of one kind side by side. Seeds are drawn next to each other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path
from statistics import fmean

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pipeline.evaluation.result import KINDS, Kind
from pipeline.report.chart_style import (
    SOFT,
    Chart,
    Mark,
    figure_of,
    plot_level,
    plot_line,
    plot_majority,
    plot_marks,
    plot_rule,
    write_number,
    write_png,
)
from pipeline.report.comparison import NOISE, SIGNIFICANT, Difference, near_hydra, signed
from pipeline.report.per_class import MajorityClass
from pipeline.report.results import (
    CertifiedCurves,
    Comparisons,
    RunResult,
    accuracies,
    attack_text,
    budget_unit,
    claim,
    pruned_text,
)

NEAR = f", {NOISE} of HYDRA"
MOST_NUMBERS = 6
"""Methods whose means are written into the chart; the numbers of more would not stay beside their markers."""


def draw_accuracy(
    runs: list[RunResult], comparisons: Comparisons, path: Path, majority: MajorityClass | None = None
) -> None:
    """Write robust and clean accuracy against sparsity as a PNG; see `accuracy_chart`."""
    write_png(accuracy_figure(runs, comparisons, majority), path)


def accuracy_figure(runs: list[RunResult], comparisons: Comparisons, majority: MajorityClass | None = None) -> Figure:
    seeds = "" if len(runs) == 1 else f"; means of {len(runs)} seeds"
    heading = f"{attack_text(runs)}{seeds}; bars and bands: 95 % Wilson intervals"
    keeps = runs[0].recipe.sparsity.keep_fractions
    if any(any(near_hydra(runs, comparisons, name, keep)) for name in runs[0].baselines for keep in keeps):
        heading += f"\nhollow marker: {NOISE} of HYDRA (McNemar's p of {SIGNIFICANT} or more)"
    missing = [f"{n.name} at {n.pruned} pruned" for run in runs for n in run.networks if n.evaluation is None]
    if missing:
        heading += f"\nnot evaluated yet: {', '.join(dict.fromkeys(missing))}"
    charts = [accuracy_chart(runs, comparisons, kind, majority) for kind in reversed(KINDS)]
    return figure_of(charts, ["dense", "HYDRA", *runs[0].baselines], heading, 4.8)


def draw_certified(
    runs: list[RunResult], curves: CertifiedCurves, path: Path, majority: MajorityClass | None = None
) -> None:
    """Write certified accuracy against radius as a PNG; see `certified_charts`."""
    names = ["dense", "HYDRA", *runs[0].baselines]
    write_png(figure_of(certified_charts(runs, curves, majority), names, attack_text(runs), 4.8), path)


def accuracy_chart(
    runs: list[RunResult], comparisons: Comparisons, kind: Kind, majority: MajorityClass | None = None
) -> Chart:
    """Accuracy against sparsity with 95 % Wilson intervals. Seeds are side by side; lines and numbers are their means.

    A hollow marker is a robust accuracy whose difference from HYDRA's is within noise. `majority` is a dotted line.
    """
    keeps = sorted(runs[0].recipe.sparsity.keep_fractions, reverse=True)
    position = {keep: -math.log10(keep) for keep in keeps}
    span = max(position[keeps[-1]] - position[keeps[0]], 0.5)
    names = ["HYDRA", *runs[0].baselines]
    slots = len(names) * len(runs)
    slot = min(0.035, 0.3 / slots) * span
    dense = accuracies(runs, "dense", Decimal(1), kind)
    words = [f"dense {100 * fmean(a['value'] for a in dense):.1f} %"] if dense else []
    marks: dict[str, list[Mark]] = {name: [] for name in names}
    means: dict[str, dict[Decimal, Mark]] = {name: {} for name in names}
    for index, name in enumerate(names):
        for keep in keeps:
            # A slot per network and seed, so that no interval hides another.
            first = position[keep] + slot * (index * len(runs) - (slots - 1) / 2)
            measured = accuracies(runs, name, keep, kind)
            near = near_hydra(runs, comparisons, name, keep) if kind == "robust" else [False] * len(measured)
            seeds = [
                _accuracy_mark(accuracy, first + slot * i, f"{name}, {pruned_text(keep)} pruned", hollow)
                for i, (accuracy, hollow) in enumerate(zip(measured, near, strict=True))
            ]
            if not seeds:
                continue
            marks[name] += seeds
            mean, middle = fmean(mark.y for mark in seeds), first + slot * (len(runs) - 1) / 2
            means[name][keep] = Mark(middle, mean, "", *_bounds(measured))
            of = "" if len(runs) == 1 else f" in {sum(near)} of {len(near)} seeds"
            words.append(f"{name} {mean:.1f} % at {pruned_text(keep)} pruned{f'{NEAR}{of}' if any(near) else ''}")

    def paint(axes: Axes) -> None:
        axes.set_xlim(position[keeps[0]] - 0.2 * span, position[keeps[-1]] + 0.2 * span)
        axes.set_xticks([position[keep] for keep in keeps], [pruned_text(keep) for keep in keeps])
        axes.set_xlabel(f"{budget_unit(runs)} pruned (log scale in the kept fraction)")
        for name in names:
            plot_line(axes, name, [m.x for m in means[name].values()], [m.y for m in means[name].values()])
            plot_marks(axes, name, marks[name], faint=len(runs) > 1)
        if dense:
            level, (low, high) = 100 * fmean(a["value"] for a in dense), _bounds(dense)
            plot_level(axes, "dense", level, low, high)
            write_number(axes, "dense", axes.get_xlim()[1], level, level, ha="right", va="bottom")
        if majority is not None:
            plot_majority(axes, 100 * majority.share)
        axes.margins(y=0.16)
        axes.autoscale_view(scalex=False)
        axes.set_ylim(bottom=max(axes.get_ylim()[0], 0.0))
        for keep in keeps if len(names) <= MOST_NUMBERS else ():
            _write_means(axes, {name: means[name][keep] for name in names if keep in means[name]})

    if majority is not None:
        words.append(f"always answering {majority.name} {100 * majority.share:.1f} %")
    word = claim(runs) if kind == "robust" else kind
    return Chart(f"{word.capitalize()} accuracy, %", f"{'; '.join(words) or 'nothing is evaluated yet'}.", paint)


def difference_chart(differences: Sequence[Difference], runs: list[RunResult]) -> Chart | None:
    """HYDRA's lead over each baseline with 95 % intervals, and a line at zero."""
    marks: dict[str, list[Mark]] = {}
    groups: dict[Decimal, list[int]] = {}
    words: list[str] = []
    for difference in differences:
        if difference.test is None:
            continue
        lead, place = 100 * difference.test.difference, len(words)
        where = f"{pruned_text(difference.keep_fraction)} pruned, over {difference.baseline}"
        note = f"{where}: {signed(lead, 2)} percentage points, {difference.outcome}"
        mark = Mark(place, lead, note, 100 * difference.low, 100 * difference.high, difference.outcome == NOISE)
        marks.setdefault(difference.baseline, []).append(mark)
        groups.setdefault(difference.keep_fraction, []).append(place)
        words.append(note)
    if not words:
        return None

    def paint(axes: Axes) -> None:
        axes.set_xlim(-0.6, len(words) - 0.4)
        axes.set_xticks([fmean(places) for places in groups.values()], [pruned_text(keep) for keep in groups])
        axes.set_xlabel(f"{budget_unit(runs)} pruned")
        axes.axhline(0, color=SOFT, linewidth=1)
        for places in groups.values():
            if places[0] > 0:
                plot_rule(axes, places[0] - 0.5)
        for name, points in marks.items():
            plot_marks(axes, name, points)
        axes.margins(y=0.1)
        axes.autoscale_view(scalex=False)

    return Chart(
        "HYDRA's lead, percentage points", f"Percentage points of {claim(runs)} accuracy: {'; '.join(words)}.", paint
    )


def certified_charts(
    runs: list[RunResult], curves: CertifiedCurves, majority: MajorityClass | None = None
) -> list[Chart]:
    """Certified accuracy against radius, one chart per sparsity, each with the dense network; means over seeds.

    A single run has 95 % interval bands. The vertical line is the threat model's eps.
    """
    keeps = runs[0].recipe.sparsity.keep_fractions if curves else ()
    return [chart for keep in keeps if (chart := _certified_chart(runs, curves, keep, majority))]


def _certified_chart(
    runs: list[RunResult], curves: CertifiedCurves, keep: Decimal, majority: MajorityClass | None
) -> Chart | None:
    per_network: dict[str, list[list[dict[str, float]]]] = {}
    for (_, name, fraction), points in curves.items():
        if fraction == keep or name == "dense":
            per_network.setdefault(name, []).append(points)
    if not per_network:
        return None
    radii = [point["radius"] for point in next(iter(per_network.values()))[0]]
    threat_model = runs[0].recipe.threat_model
    eps = float(threat_model.eps) if threat_model else 0.0

    def paint(axes: Axes) -> None:
        for name, seeds in per_network.items():
            means = [100 * fmean(point["value"] for point in at_radius) for at_radius in zip(*seeds, strict=True)]
            low, high = ([100 * point[bound] for point in seeds[0]] for bound in ("low", "high"))
            plot_line(axes, name, radii, means, band=(low, high) if len(seeds) == 1 else None)
        if threat_model:
            plot_rule(axes, eps, f"eps {threat_model.eps}")
        if majority is not None:
            plot_majority(axes, 100 * majority.share)
        axes.set_xlim(0, 1.05 * max(radii[-1], eps) or 1.0)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("l2 radius")

    title = f"Certified accuracy, %, {pruned_text(keep)} pruned"
    return Chart(title, f"Networks: {', '.join(per_network)}.", paint)


def _accuracy_mark(accuracy: dict[str, float], x: float, network: str, hollow: bool) -> Mark:
    value, low, high = (100 * accuracy[part] for part in ("value", "low", "high"))
    note = f"{network}: {value:.2f} % [{low:.2f}, {high:.2f}]{NEAR if hollow else ''}"
    return Mark(x, value, note, low, high, hollow)


def _bounds(accuracies: list[dict[str, float]]) -> tuple[float, float]:
    return 100 * min(a["low"] for a in accuracies), 100 * max(a["high"] for a in accuracies)


def _write_means(axes: Axes, means: dict[str, Mark]) -> None:
    """Write the means of one sparsity: the best network's above its interval, the others' below theirs.

    Overlapping numbers are pushed down, and the axes grow to fit them.
    """
    low, high = axes.get_ylim()
    gap = 0.07 * (high - low)
    previous = math.inf
    for place, (name, mean) in enumerate(sorted(means.items(), key=lambda item: (-item[1].y, item[1].x))):
        y = mean.high + 0.6 * gap if place == 0 else min(mean.low - 0.6 * gap, previous - gap)
        previous = y if place else math.inf
        low = min(low, y - gap)
        write_number(axes, name, mean.x, y, mean.y)
    axes.set_ylim(low, high)
