"""Temporary folders of clusters: private, short, and cleaned up after their owner's earlier ones."""

from __future__ import annotations

import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.scratch import LONGEST, new_scratch

RAY_SOCKET = "/session_2026-11-22_22-45-25_123456_1234567/sockets/plasma_store.1"


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="s") as folder:
        monkeypatch.setattr(tempfile, "tempdir", folder)
        yield Path(folder)


def test_it_is_private_and_new_each_time(short: Path) -> None:
    one, other = new_scratch(), new_scratch()
    assert one != other
    assert one.parent == other.parent == short
    assert [stat.S_IMODE(path.stat().st_mode) for path in (one, other)] == [0o700, 0o700]


def test_only_the_same_owners_earlier_one_is_removed(short: Path) -> None:
    killed, neighbour, local = new_scratch("7 n1"), new_scratch("7 n2"), new_scratch()
    (killed / "session").mkdir()
    assert new_scratch("7 n1") != killed
    assert not killed.exists()
    assert neighbour.exists()
    assert local.exists()


@pytest.mark.parametrize("owner", ["", "123456789_1234 a-long-name-of-a-node.cluster.example.org"])
def test_rays_sockets_fit_wherever_tmpdir_leads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: str) -> None:
    deep = tmp_path / ("a-folder-per-job-" * 4)
    deep.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    folder = new_scratch(owner)
    try:
        assert len(str(folder)) <= LONGEST
        assert len(f"{folder}{RAY_SOCKET}") <= 107
    finally:
        folder.rmdir()
