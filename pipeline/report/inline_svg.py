"""Converts matplotlib figures to inline SVG: text stays text, and colours become the page's CSS variables.

One drawing thus suits light mode, dark mode and print. It makes no requests and has no clip paths, style sheet or
namespaces, which inline SVG would share with the page. The XML writer escapes all text.
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
OMITTED_TAGS = ("metadata", "style", "clipPath")
OMITTED_STYLES = re.compile(r"(font-family: [^;]*|stroke-dashoffset: 0); ")
COLOUR, NUMBER = re.compile(r"#[0-9a-f]{6}"), re.compile(r"-?\d+\.\d+")


def tag(artist: Artist, kind: str, notes: Sequence[str] = ()) -> None:
    """Label an artist: in the SVG, `kind` becomes its class and `notes` the titles of its markers, in order."""
    artist.set_gid(json.dumps([kind, *notes]))


def inline_svg(figure: Figure, variables: dict[str, str], attributes: dict[str, str]) -> str:
    """Render an svg element with `attributes`; `variables` maps every colour (#rrggbb) of the figure to a CSS value.

    Data must lie within the axes, because clip paths are omitted. Only matplotlib's ids of markers and ticks remain;
    `svg.hashsalt` makes them unique.
    """
    figure.patch.set_visible(False)
    stream = io.BytesIO()
    figure.savefig(stream, format="svg")
    original = ET.fromstring(stream.getvalue())
    root = ET.Element("svg", {"viewBox": original.attrib["viewBox"], **attributes})
    root.extend([part for child in original for part in _parts(child, variables)])
    return ET.tostring(root, encoding="unicode")


def _parts(element: ET.Element, variables: dict[str, str]) -> list[ET.Element]:
    """The parts of a matplotlib SVG element to keep: groups labelled by `tag`, shapes and text."""
    name = element.tag.removeprefix(SVG)
    if name in OMITTED_TAGS:
        return []
    children = [part for child in element for part in _parts(child, variables)]
    is_tagged = name == "g" and element.get("id", "").startswith("[")
    if not children and name in ("g", "defs"):
        return []
    if name == "g" and not is_tagged:
        return children
    part = ET.Element(name, dict(_attributes(element, variables)))
    part.extend(children)
    part.text = element.text if name == "text" else None
    if is_tagged:
        kind, *notes = json.loads(part.attrib.pop("id"))
        part.set("class", kind)
        _name_marks(part, [use for use in children if use.tag == "use"], notes)
    return [part]


def _name_marks(group: ET.Element, marks: list[ET.Element], notes: list[str]) -> None:
    """Add titles to the markers, and move their common style to the group."""
    for mark, note in zip(marks, notes, strict=True) if notes else ():
        ET.SubElement(mark, "title").text = note
    for mark in marks:
        group.set("style", mark.attrib.pop("style"))


def _attributes(element: ET.Element, variables: dict[str, str]) -> Iterator[tuple[str, str]]:
    """Shortened attributes, with CSS variables for colours and without fonts."""
    for name, value in element.items():
        if name == "clip-path" or value.startswith("rotate(-0 "):
            continue
        if name == "style":
            value = COLOUR.sub(lambda match: variables[match[0]], OMITTED_STYLES.sub("", value))
            value = re.sub(r"([:;,]) ", r"\1", value)
        if name == "d":
            value = re.sub(r"\s*([A-Za-z]|$)\s*", r"\1", value)
        if name != "id":
            value = NUMBER.sub(lambda match: f"{float(match[0]):.2f}".rstrip("0").rstrip("."), value)
        yield name.rpartition("}")[2], value
