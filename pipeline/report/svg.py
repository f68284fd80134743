"""Charts as inline SVG: lines with marks and intervals on two axes.

Colours, line styles and fonts are the page's (style.css), by class, so that one drawing is right in light, dark and
print. Texts are escaped by the XML writer. A drawing is a few hundred units wide, about what a phone shows.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from xml.etree import ElementTree as ET

LEFT, RIGHT, TOP, BOTTOM = 47.0, 12.0, 12.0, 34.0
"""Margins around the data, in units of the drawing."""
CAP = 3.0
"""Half the width of the bar at an interval's end."""
LINE_HEIGHT = 13.0

Ticks = tuple[tuple[float, str], ...]


@dataclass(frozen=True)
class Axis:
    """From where to where the data are drawn, and what is written beside it; a logarithm is the caller's to take."""

    low: float
    high: float
    ticks: Ticks
    label: str = ""

    def share(self, value: float) -> float:
        """0 at the axis' beginning, 1 at its end."""
        return (value - self.low) / (self.high - self.low)


@dataclass(frozen=True)
class Point:
    x: float
    y: float
    low: float | None = None
    high: float | None = None
    """The interval, where there is one."""
    note: str = ""
    """Shown while the mouse rests on the mark."""


@dataclass(frozen=True)
class Series:
    """Points of one network; `style` is its class in style.css."""

    style: str
    points: Sequence[Point]
    line: bool = True
    marks: bool = True
    band: bool = False
    """Intervals as an area instead of bars."""
    faint: bool = False


@dataclass(frozen=True)
class Level:
    """A horizontal line across the whole drawing, with the band of its interval."""

    style: str
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Label:
    """A number written `shift` units of the drawing above (x, y)."""

    style: str
    x: float
    y: float
    text: str
    shift: float


@dataclass(frozen=True)
class Chart:
    title: str
    svg: str


def nice_axis(values: Iterable[float], label: str = "", *, pad: float = 0.08, count: int = 5) -> Axis:
    """An axis around the values, with at most about `count` round ticks (steps of 1, 2 or 5 times a power of ten)."""
    found = [value for value in values if math.isfinite(value)] or [0.0, 1.0]
    low, high = min(found), max(found)
    room = pad * (high - low) or 0.05 * abs(high) or 0.5
    low, high = (low - room if pad else low), high + room
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * (1 - 1e-9))
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return Axis(low, high, tuple((n * step, f"{n * step + 0.0:.{digits}f}") for n in range(first, last + 1)), label)


def draw(
    title: str,
    series: Sequence[Series],
    x: Axis,
    y: Axis,
    *,
    says: str,
    size: tuple[float, float] = (360.0, 230.0),
    levels: Sequence[Level] = (),
    rules: Sequence[float] = (),
    labels: Sequence[Label] = (),
) -> Chart:
    """Draw a chart of (width, height) `size`; `says` is what it shows in words, for who does not see it. `rules` are
    thin vertical lines."""
    width, height = size
    canvas = _Canvas(x, y, width, height)
    root = ET.Element("svg", {"viewBox": f"0 0 {width:g} {height:g}", "role": "img", "aria-label": f"{title}. {says}"})
    _axes(root, canvas, rules)
    for level in levels:
        group = ET.SubElement(root, "g", {"class": f"series {level.style}"})
        top, bottom = canvas.y(level.high), canvas.y(level.low)
        box = {"x": LEFT, "y": top, "width": width - LEFT - RIGHT, "height": max(bottom - top, 0.0)}
        _add(group, "rect", {"class": "band", **box})
        across = [(LEFT, canvas.y(level.value)), (width - RIGHT, canvas.y(level.value))]
        _add(group, "path", {"class": "line", "d": _path(across)})
    for one in series:
        _series(root, canvas, one)
    for label in labels:
        place = {"x": canvas.x(label.x), "y": canvas.y(label.y) - label.shift}
        _add(root, "text", {"class": f"number {label.style}", **place}, label.text)
    return Chart(title, ET.tostring(root, encoding="unicode"))


def sample(style: str) -> str:
    """Line and mark of one style, for a legend."""
    root = ET.Element("svg", {"viewBox": "0 0 30 12", "class": "sample", "aria-hidden": "true"})
    group = ET.SubElement(root, "g", {"class": f"series {style}"})
    _add(group, "path", {"class": "line", "d": "M1 6H29"})
    if shape := _mark(style, 15, 6):
        _add(group, "path", {"class": "mark", "d": shape})
    return ET.tostring(root, encoding="unicode")


@dataclass(frozen=True)
class _Canvas:
    x_axis: Axis
    y_axis: Axis
    width: float
    height: float

    def x(self, value: float) -> float:
        return LEFT + (self.width - LEFT - RIGHT) * self.x_axis.share(value)

    def y(self, value: float) -> float:
        return self.height - BOTTOM - (self.height - TOP - BOTTOM) * self.y_axis.share(value)


def _axes(root: ET.Element, canvas: _Canvas, rules: Sequence[float]) -> None:
    right, bottom = canvas.width - RIGHT, canvas.height - BOTTOM
    grid = ET.SubElement(root, "g", {"class": "axes"})
    for value, text in canvas.y_axis.ticks:
        _add(grid, "path", {"class": "grid", "d": _path([(LEFT, canvas.y(value)), (right, canvas.y(value))])})
        _add(grid, "text", {"class": "y", "x": LEFT - 5, "y": canvas.y(value) + 3.5}, text)
    for value in rules:
        _add(grid, "path", {"class": "rule", "d": _path([(canvas.x(value), TOP), (canvas.x(value), bottom)])})
    _add(grid, "path", {"class": "base", "d": _path([(LEFT, bottom), (right, bottom)])})
    for value, text in canvas.x_axis.ticks:
        _add(grid, "path", {"class": "base", "d": _path([(canvas.x(value), bottom), (canvas.x(value), bottom + 3)])})
        _add(grid, "text", {"class": "x", "x": canvas.x(value), "y": bottom + LINE_HEIGHT + 1}, text)
    _add(grid, "text", {"class": "x label", "x": (LEFT + right) / 2, "y": canvas.height - 4}, canvas.x_axis.label)


def _series(root: ET.Element, canvas: _Canvas, series: Series) -> None:
    group = ET.SubElement(root, "g", {"class": f"series {series.style}{' faint' if series.faint else ''}"})
    places = [(canvas.x(p.x), canvas.y(p.y)) for p in series.points]
    bounds = [
        (canvas.x(point.x), canvas.y(point.low), canvas.y(point.high))
        for point in series.points
        if point.low is not None and point.high is not None
    ]
    if series.band and bounds:
        outline = [(x, high) for x, _, high in bounds] + [(x, low) for x, low, _ in reversed(bounds)]
        _add(group, "path", {"class": "band", "d": _path(outline) + "Z"})
    if series.line and len(places) > 1:
        _add(group, "path", {"class": "line", "d": _path(places)})
    if not series.band:
        for x, low, high in bounds:
            ends = [(x - CAP, low), (x + CAP, low)], [(x, low), (x, high)], [(x - CAP, high), (x + CAP, high)]
            _add(group, "path", {"class": "interval", "d": "".join(_path(end) for end in ends)})
    if series.marks:
        for (x, y), point in zip(places, series.points, strict=True):
            mark = _add(group, "path", {"class": "mark", "d": _mark(series.style, x, y) or _circle(x, y, 2.5)})
            if point.note:
                _add(mark, "title", {}, point.note)


def _mark(style: str, x: float, y: float) -> str:
    """The shape that tells a network apart where its colour does not; none for the dense one."""
    match style.split()[0]:
        case "hydra":
            return _circle(x, y, 4)
        case "magnitude":
            return _polygon(x, y, [(-3.6, -3.6), (3.6, -3.6), (3.6, 3.6), (-3.6, 3.6)])
        case "random":
            return _polygon(x, y, [(0, -4.8), (4.6, 3.4), (-4.6, 3.4)])
        case "snip":
            return _polygon(x, y, [(0, -5), (5, 0), (0, 5), (-5, 0)])
    return ""


def _circle(x: float, y: float, radius: float) -> str:
    half = f"a{radius:g} {radius:g} 0 1 0 "
    return f"M{x - radius:.2f} {y:.2f}{half}{2 * radius:g} 0{half}{-2 * radius:g} 0Z"


def _polygon(x: float, y: float, corners: Sequence[tuple[float, float]]) -> str:
    return _path([(x + right, y + down) for right, down in corners]) + "Z"


def _path(places: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:.2f} {y:.2f}" for x, y in places)


def _add(parent: ET.Element, tag: str, attributes: dict[str, str | float], text: str | None = None) -> ET.Element:
    values = {name: value if isinstance(value, str) else f"{value:.2f}" for name, value in attributes.items()}
    element = ET.SubElement(parent, tag, values)
    element.text = text
    return element
