"""Tables as plain text, for terminals."""

from __future__ import annotations

from collections.abc import Sequence

from tabulate import simple_separated_format, tabulate


def text_table(rows: Sequence[Sequence[str]], left: Sequence[str], gap: int = 2) -> str:
    """Format aligned columns, `gap` spaces apart. The first row is the header; columns named in `left` are
    left-aligned, all others right-aligned."""
    return tabulate(
        rows,
        tablefmt=simple_separated_format(" " * gap),
        colalign=["left" if name in left else "right" for name in rows[0]],
        disable_numparse=True,
    )
