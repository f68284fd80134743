"""matplotlib's figures as SVG inside a page: text stays text, and colours are the page's CSS variables.

So one drawing is right in light, dark and print. It makes no request, and has no clip paths, style sheet or namespaces,
which inline SVG would share with the whole page. Texts are escaped by the XML writer.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator, Sequence
from xml.etree import ElementTree as ET

from matplotlib.artist import Artist
from matplotlib.figure import Figure

SVG = "{http://www.w3.org/2000/svg}"
LEFT_OUT = ("metadata", "style", "clipPath")
STYLE_LEFT_OUT = re.compile(r"(font-family: [^;]*|stroke-dashoffset: 0); ")
COLOUR, NUMBER = re.compile(r"#[0-9a-f]{6}"), re.compile(r"-?\d+\.\d+")


def tag(artist: Artist, kind: str, notes: Sequence[str] = ()) -> None:
    """Say what is drawn: in the SVG `kind` is the class, and `notes` are the titles of the marks, in order."""
    artist.set_gid(json.dumps([kind, *notes]))


def inline_svg(figure: Figure, variables: dict[str, str], attributes: dict[str, str]) -> str:
    """An svg element with `attributes`; `variables` has a CSS value for every colour (#rrggbb) of the figure.

    Data must lie within the axes: clip paths are left out. Of matplotlib's ids those of marks and ticks remain, which
    `svg.hashsalt` tells apart.
    """
    figure.patch.set_visible(False)
    stream = io.BytesIO()
    figure.savefig(stream, format="svg")
    drawn = ET.fromstring(stream.getvalue())
    root = ET.Element("svg", {"viewBox": drawn.attrib["viewBox"], **attributes})
    root.extend([part for child in drawn for part in _parts(child, variables)])
    return ET.tostring(root, encoding="unicode")


def _parts(element: ET.Element, variables: dict[str, str]) -> list[ET.Element]:
    """What a page needs of an element of matplotlib's SVG: groups that `tag` named, shapes and texts."""
    name = element.tag.removeprefix(SVG)
    if name in LEFT_OUT:
        return []
    inside = [part for child in element for part in _parts(child, variables)]
    tagged = name == "g" and element.get("id", "").startswith("[")
    if not inside and name in ("g", "defs"):
        return []
    if name == "g" and not tagged:
        return inside
    part = ET.Element(name, dict(_attributes(element, variables)))
    part.extend(inside)
    part.text = element.text if name == "text" else None
    if tagged:
        kind, *notes = json.loads(part.attrib.pop("id"))
        part.set("class", kind)
        _name_marks(part, [use for use in inside if use.tag == "use"], notes)
    return [part]


def _name_marks(group: ET.Element, marks: list[ET.Element], notes: list[str]) -> None:
    """Give marks their titles, and the group their common style."""
    for mark, note in zip(marks, notes, strict=True) if notes else ():
        ET.SubElement(mark, "title").text = note
    for mark in marks:
        group.set("style", mark.attrib.pop("style"))


def _attributes(element: ET.Element, variables: dict[str, str]) -> Iterator[tuple[str, str]]:
    """Short, with variables for colours and the page's font."""
    for name, value in element.items():
        if name == "clip-path" or value.startswith("rotate(-0 "):
            continue
        if name == "style":
            value = COLOUR.sub(lambda match: variables[match[0]], STYLE_LEFT_OUT.sub("", value))
            value = re.sub(r"([:;,]) ", r"\1", value)
        if name == "d":
            value = re.sub(r"\s*([A-Za-z]|$)\s*", r"\1", value)
        if name != "id":
            value = NUMBER.sub(lambda match: f"{float(match[0]):.2f}".rstrip("0").rstrip("."), value)
        yield name.rpartition("}")[2], value
