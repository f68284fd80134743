"""Text of files for people: a stranger's file must not control the terminal, or the direction of the text around it."""

from __future__ import annotations

import re
import unicodedata

COLOURS = re.compile(r"\x1b\[[0-9;]*m")
"""Of log lines: harmless, and they say nothing."""
UNCOMMON = re.compile(r"[^\n\t -~]")
"""All but printable ASCII, line breaks and tabs: most characters of a log need no further look."""
DIRECTION = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
"""Marks that change the direction of what follows."""
HIDDEN = frozenset({"Cc", "Cs", "Zl", "Zp"})
"""Unicode categories: control characters, surrogates, separators of lines and paragraphs."""


def printable(text: str) -> str:
    """`text` with control characters and direction marks spelled out, as in "\\x1b"; line breaks and tabs stay."""
    return UNCOMMON.sub(_visible, COLOURS.sub("", text))


def printable_line(text: str) -> str:
    """For a name within a line: line breaks, tabs and colours are spelled out too."""
    return UNCOMMON.sub(_visible, text).replace("\n", "\\n").replace("\t", "\\t")


def _visible(found: re.Match[str]) -> str:
    character = found.group()
    if character not in DIRECTION and unicodedata.category(character) not in HIDDEN:
        return character
    return character.encode("unicode_escape").decode()
