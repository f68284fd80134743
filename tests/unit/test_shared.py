"""What tests share is made by one of them, and again where that failed."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support.shared import made_once


def test_it_is_made_by_the_first_of_several(tmp_path: Path) -> None:
    made: list[Path] = []

    def make(place: Path) -> None:
        place.mkdir()
        made.append(place)

    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(lambda _: made_once(tmp_path / "it", make), range(8))) == {tmp_path / "it"}
    assert made == [tmp_path / "it"]


def test_what_a_failure_left_is_made_again(tmp_path: Path) -> None:
    def fail(place: Path) -> None:
        (place / "half").mkdir(parents=True)
        raise OSError("no room")

    with pytest.raises(OSError, match="no room"):
        made_once(tmp_path / "it", fail)
    assert list(made_once(tmp_path / "it", Path.mkdir).iterdir()) == []
