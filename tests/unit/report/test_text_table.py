"""Text tables: columns fit their widest cell, and cells are printed verbatim."""

from __future__ import annotations

from pipeline.report.text_table import text_table


def test_columns_are_aligned_and_cells_are_not_interpreted() -> None:
    rows = [["stage", "step", "p", "note"], ["a", "010", "1e-5", ""], ["longer", "7", "", "two  words"]]
    assert text_table(rows, left=["stage", "note"]).splitlines() == [
        "stage   step     p  note",
        "a        010  1e-5",
        "longer     7        two  words",
    ]


def test_gap() -> None:
    assert text_table([["a", "b"], ["10", "2"]], left=[], gap=1) == " a b\n10 2"
