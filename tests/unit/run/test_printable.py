"""Control characters and direction marks of a stranger's files are spelled out; text of any language stays."""

from __future__ import annotations

import pytest

from pipeline.run.printable import printable, printable_line


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a line\n\tand another", "a line\n\tand another"),
        ("\x1b[31mred\x1b[0m", "red"),
        ("\x1b]0;title\x07\x1b[2J", "\\x1b]0;title\\x07\\x1b[2J"),
        ("50 %\r99 %\x08", "50 %\\r99 %\\x08"),
        ("\x9b31m", "\\x9b31m"),
        ("dog\u202egod\u2066", "dog\\u202egod\\u2066"),
        ("a\u2028b\udcff", "a\\u2028b\\udcff"),
        ("Größe, 猫, 👩\u200d🔬", "Größe, 猫, 👩\u200d🔬"),
    ],
)
def test_what_is_shown(text: str, shown: str) -> None:
    assert printable(text) == shown


def test_a_name_stays_on_its_line() -> None:
    assert printable_line("a\n\tb \x1b[31mred\u202e") == "a\\n\\tb \\x1b[31mred\\u202e"
