"""How each method is drawn: its colour, line and marker in all charts, and its CSS name."""

from __future__ import annotations

import cmath
import math
import re
from typing import NamedTuple

from pipeline.recipe.methods import TITLES, Allocation, Method, Structure


class MethodStyle(NamedTuple):
    colour: str
    """In PNG files, and on the page in light mode and print."""
    dark: str
    mark: str | tuple[tuple[float, float], ...]
    """Matplotlib's name, or the corners of a polygon; empty for none."""
    mark_size: float
    """Points."""
    dashes: str | tuple[float, tuple[float, ...]]


OWN = {
    "dense": MethodStyle("#4a4f57", "#d5dae0", "", 0.0, (0, (5, 2))),
    "HYDRA": MethodStyle("#0072b2", "#4da3ff", "o", 8.0, "-"),
    "magnitude": MethodStyle("#b94e00", "#ff9248", "s", 7.2, (0, (2.8, 1.7))),
    "random": MethodStyle("#00734f", "#3ddc97", "^", 9.0, (0, (1, 1.6))),
    "SNIP": MethodStyle("#a8478a", "#f59ad5", "D", 7.0, (0, (4.5, 1.7, 1, 1.7))),
    "S2AP": MethodStyle("#0d0d12", "#8dff8f", "p", 9.0, (0, (7, 1.7, 1, 1.7, 1, 1.7))),
    "gradual": MethodStyle("#9500f5", "#778bb9", "*", 11.0, (0, (7, 1.5))),
    "Flying Bird": MethodStyle("#800f03", "#f74e14", "H", 9.0, (0, (4, 1, 1, 1, 1, 1))),
    "Flying Bird+": MethodStyle("#771091", "#ab8273", "h", 9.0, (0, (2, 3))),
}
"""Title of a method -> its style. The first five have hues of Okabe and Ito's colour-blind-safe palette, darkened to a
text contrast of 4.5; the others are as far from these as that contrast allows, for any colour vision. Markers and
dashes remain distinct in greyscale."""
_MARKS: dict[Allocation, str] = {"uniform": "<", "erk": "P", "global": "X", "learned": "v", "harp": ">"}


def _star(points: int, inner: float) -> list[complex]:
    """Corners of a star, every other one at distance `inner` from its centre; 1 gives a regular polygon."""
    return [cmath.rect(inner if i % 2 else 1.0, math.pi * (0.5 + i / points)) for i in range(2 * points)]


def _box(width: float, height: float) -> list[complex]:
    return [complex(x * width, y * height) for x, y in ((1, 1), (1, -1), (-1, -1), (-1, 1))]


_CORNERS: dict[Structure, list[complex]] = {
    "unstructured": _star(2, 0.35),
    "2:4": _star(4, 0.4),
    "1:4": _star(3, 0.4),
    "4:8": _star(8, 0.6),
    "1x4": _box(1.0, 0.35),
    "4x1": _box(0.35, 1.0),
    "16x16": _star(4, 1.0),
    "channel": _star(5, 0.45),
}


def _turned(corners: list[complex], degrees: float) -> tuple[tuple[float, float], ...]:
    """The closed polygon as matplotlib takes it."""
    points = [corner * cmath.rect(1.0, math.radians(degrees)) for corner in (*corners, corners[0])]
    return tuple((point.real, point.imag) for point in points)


METHODS = OWN | {
    Method(name=name, allocation=allocation).title: OWN[title]._replace(mark=mark)
    for name, title in TITLES.items()
    for allocation, mark in _MARKS.items()
}
METHODS |= {
    Method(name=name, allocation=allocation, structure=structure).title: OWN[title]._replace(
        mark=_turned(corners, 12.0 * turns), mark_size=11.0
    )
    for name, title in TITLES.items()
    for structure, corners in _CORNERS.items()
    for turns, allocation in enumerate((None, *_MARKS))
}
"""And of a method with an allocation or structure of its own: the method's colour and dashes, the marker of the
structure, turned by the allocation, or else of the allocation."""
OTHER = "other"
"""A network whose method is not known."""
METHODS[OTHER] = MethodStyle("#5a6572", "#5a6572", "d", 8.0, "-")


def css_name(name: str) -> str:
    """Title of a method -> name of its CSS classes and variable."""
    return re.sub("[^a-z0-9]+", "-", name.lower().replace("+", " plus")).strip("-")
