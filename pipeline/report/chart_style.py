"""The common style of all charts: one colour, marker and line style per method, in PNG files and on the page.

Both are drawn by matplotlib without pyplot, independent of the user's matplotlibrc.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke

from pipeline.report.inline_svg import inline_svg, tag
from pipeline.report.method_style import METHODS, OWN, css_name
from pipeline.run.files import replacing

TEXT, SOFT, GRID, CARD = "#1b2129", "#5a6572", "#dfe3e8", "#ffffff"


VARIABLES = {method.colour: f"var(--{css_name(name)})" for name, method in OWN.items()}
VARIABLES |= {SOFT: "var(--soft)", GRID: "var(--line)", CARD: "var(--card)"}
"""Colour in a drawing -> CSS variable of the page."""

LEGEND_ENTRY, LEGEND_ROW = 1.9, 0.25
"""Width of a method and height of a row of methods, in inches."""
HELD_OUT_SCALE = 0.8
DOT = {"marker": "o", "markersize": 4.0}
"""Marker of the dense network on held-out images; elsewhere it has none."""

SETTINGS: dict[str, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # names of layers and attacks are not formulas
    "text.color": SOFT,
    "axes.labelcolor": SOFT,
    "axes.edgecolor": SOFT,
    "axes.linewidth": 1.0,
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "grid.color": GRID,
    "grid.linewidth": 1.0,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "ytick.left": False,
    "lines.solid_capstyle": "butt",
    "legend.frameon": False,
    "legend.handlelength": 3.0,
    "path.simplify": False,
}
_LOCK = threading.RLock()


class Size(NamedTuple):
    """Of a chart on the page and its font, in points: about a phone's width at scale 1."""

    width: float
    height: float
    font: float


LARGE, SMALL = Size(360, 230, 11), Size(300, 200, 12.5)


@dataclass(frozen=True)
class Chart:
    title: str
    words: str
    """Text alternative for screen readers."""
    paint: Callable[[Axes], None]
    size: Size = LARGE
    key: str = ""
    """Title and key are unique on a page: the ids in the SVG derive from both."""

    def svg(self) -> str:
        width, height, font = self.size
        left, right, bottom, top = 4.3 * font, 12.0, 3.2 * font, 1.4 * font
        place = (left / width, bottom / height, 1 - (left + right) / width, 1 - (bottom + top) / height)
        with drawing({"font.size": font, "svg.hashsalt": f"{self.title} {self.key}"}):
            figure = Figure(figsize=(width / 72, height / 72))
            self.draw(figure.add_axes(place))
            return inline_svg(figure, VARIABLES, {"role": "img", "aria-label": f"{self.title}. {self.words}"})

    def draw(self, axes: Axes) -> None:
        axes.patch.set_visible(False)
        axes.locator_params(nbins=5, steps=[1, 2, 5, 10])
        self.paint(axes)


class Mark(NamedTuple):
    x: float
    y: float
    note: str
    """Tooltip."""
    low: float = math.nan
    high: float = math.nan
    """Bounds of the interval, in units of y; nan without one."""
    hollow: bool = False


@contextmanager
def drawing(more: dict[str, Any] | None = None) -> Iterator[None]:
    """Apply SETTINGS instead of the user's matplotlibrc, in one thread at a time."""
    with _LOCK, style.context(SETTINGS | (more or {}), after_reset=True):
        yield


def figure_of(
    charts: Sequence[Chart], names: Sequence[str], heading: str, height: float, *, shared: bool = False
) -> Figure:
    """Lay out charts side by side for a PNG of `height` inches, with a legend of `names`. `shared`: one y axis."""
    with drawing():
        width = max(5.0 * len(charts), 8.0)
        per_row = int(width / LEGEND_ENTRY)
        rows = math.ceil(len(names) / per_row)
        figure = Figure(figsize=(width, height + LEGEND_ROW * max(rows - 1, 0)), layout="constrained")
        panels = figure.subplots(1, len(charts), squeeze=False)[0] if charts else []
        for chart, axes in zip(charts, panels, strict=True):
            chart.draw(axes)
            axes.set_title(chart.title, loc="left", fontsize=12, fontweight="bold", color=TEXT)
            for text in axes.texts:
                text.set_path_effects([withStroke(linewidth=3, foreground=CARD)])
            if shared:
                axes.label_outer()
        figure.suptitle(heading, fontsize=10)
        if charts:
            keys = [Line2D([], [], **_mark(name) | _line(name)) for name in names]
            figure.legend(keys, list(names), loc="outside lower center", ncols=min(len(names), per_row))
        return figure


def write_png(figure: Figure, path: Path) -> None:
    with drawing(), replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=160)


def legend_key(name: str, place: str, *, held_out: bool = False) -> str:
    """Line and marker of a method as SVG; `place` identifies the legend on the page."""
    with drawing({"svg.hashsalt": f"{name} {place} {held_out}"}):
        figure = Figure(figsize=(30 / 72, 12 / 72))
        figure.add_artist(Line2D([1 / 30, 29 / 30], [0.5, 0.5], **_line(name, held_out)))
        figure.add_artist(Line2D([0.5], [0.5], **_mark(name, HELD_OUT_SCALE if held_out else 1.0)))
        return inline_svg(figure, VARIABLES, {"class": "sample", "aria-hidden": "true"})


def method_colours() -> str:
    """CSS with the methods' colours as variables, for light mode, dark mode and print."""
    light = " ".join(f"--{css_name(name)}: {method.colour};" for name, method in OWN.items())
    dark = " ".join(f"--{css_name(name)}: {method.dark};" for name, method in OWN.items())
    return f":root {{ {light} }}\n@media screen and (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}\n"


def plot_line(
    axes: Axes,
    name: str,
    x: Sequence[float],
    y: Sequence[float],
    *,
    held_out: bool = False,
    band: tuple[Sequence[float], Sequence[float]] | None = None,
) -> None:
    """Plot a method's line, thin and with markers for held-out images. `band`: lower and upper bounds."""
    (line,) = axes.plot(x, y, **_line(name, held_out))
    tag(line, f"line {css_name(name)}")
    if held_out:
        (marks,) = axes.plot(x, y, **_mark(name, HELD_OUT_SCALE) | ({} if METHODS[name].mark else DOT))
        tag(marks, f"mark {css_name(name)}")
    if band is not None:
        low, high = band
        axes.fill_between(x, low, high, color=METHODS[name].colour, alpha=0.14, linewidth=0)


def plot_level(axes: Axes, name: str, value: float, low: float, high: float) -> None:
    """Plot a horizontal line across the axes with the band of its interval."""
    axes.axhspan(low, high, color=METHODS[name].colour, alpha=0.14, linewidth=0)
    tag(axes.axhline(value, **_line(name)), f"line {css_name(name)}")


def plot_majority(axes: Axes, percent: float) -> None:
    """Plot the accuracy of always answering the most frequent class, with its name on the line."""
    tag(axes.axhline(percent, color=SOFT, linewidth=1.3, linestyle=(0, (1, 1.5)), zorder=1), "line majority")
    placement: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
    text = axes.annotate(f"majority class {percent:.1f}", (0, percent), (2, 2), ha="left", va="bottom", **placement)
    tag(text, "number")


def plot_rule(axes: Axes, x: float, text: str = "") -> None:
    """Plot a thin vertical line with `text` to its left."""
    axes.axvline(x, color=SOFT, linewidth=1, linestyle=(0, (1, 3)), zorder=1)
    if text:
        placement: dict[str, Any] = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points"}
        axes.annotate(text, (x, 1), (-3, 0), ha="right", va="top", **placement)


def plot_marks(axes: Axes, name: str, marks: Sequence[Mark], *, faint: bool = False, scale: float = 1.0) -> None:
    """Plot a method's markers and intervals; hollow markers are filled with the background colour."""
    kind, fill = css_name(name), {}
    for hollow in (False, True):
        group = [mark for mark in marks if mark.hollow == hollow]
        if not group:
            continue
        if hollow:
            kind += " hollow"
            fill = {"markerfacecolor": CARD, "markeredgecolor": METHODS[name].colour, "markeredgewidth": 1.6}
        bounds = [[max(m.y - m.low, 0.0) for m in group], [max(m.high - m.y, 0.0) for m in group]]
        line, caps, bars = axes.errorbar(
            [m.x for m in group],
            [m.y for m in group],
            None if math.isnan(group[0].low) else bounds,
            **_mark(name, scale) | ({} if METHODS[name].mark else DOT) | fill,
            elinewidth=1.3,
            capsize=3,
            capthick=1.3,
            alpha=0.6 if faint else None,
            zorder=3,
        )
        tag(line, f"mark {kind}", [m.note for m in group])
        for artist in (*caps, *bars):
            tag(artist, f"interval {kind}")


def write_number(axes: Axes, name: str, x: float, y: float, value: float, **align: Any) -> None:
    """Write a value in a method's colour at (x, y); `align` is matplotlib's ha and va."""
    align = {"ha": "center", "va": "center", **align}
    tag(axes.text(x, y, f"{value:.1f}", color=METHODS[name].colour, fontweight="bold", zorder=5, **align), "number")


def _line(name: str, held_out: bool = False) -> dict[str, Any]:
    method = METHODS[name]
    width, alpha = (1.1, 0.75) if held_out else (1.8, None)
    return {"color": method.colour, "linestyle": method.dashes, "linewidth": width, "alpha": alpha}


def _mark(name: str, scale: float = 1.0) -> dict[str, Any]:
    method = METHODS[name]
    edge = {"markeredgecolor": CARD, "markeredgewidth": 1.0}
    return {
        "color": method.colour,
        "linestyle": "",
        "marker": method.mark,
        "markersize": scale * method.mark_size,
        **edge,
    }
