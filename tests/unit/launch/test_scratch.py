"""Temporary folders of clusters: private, short, and removed once their lock is free."""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.ray_cluster.scratch import LOCK, LONGEST, RAY, YOUNG_S, new_scratch

RAY_SOCKET = f"/{RAY}/session_2026-11-22_22-45-25_123456_1234567/sockets/plasma_store.1"


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="s") as folder:
        monkeypatch.setattr(tempfile, "tempdir", folder)
        yield Path(folder)


def test_it_is_private_and_new_each_time(short: Path) -> None:
    (one, lock), (other, other_lock) = new_scratch(), new_scratch()
    assert one != other
    assert one.parent == other.parent == short
    assert [stat.S_IMODE(path.stat().st_mode) for path in (one, other)] == [0o700, 0o700]
    os.close(lock)
    os.close(other_lock)


def test_abandoned_folders_are_removed_at_the_next_start(short: Path) -> None:
    (killed, killed_lock), (living, living_lock) = new_scratch(), new_scratch()
    (killed / "session").mkdir()
    being_made, abandoned, foreign = short / "hydra-young", short / "hydra-old", short / "other"
    for folder in (being_made, abandoned, foreign):
        folder.mkdir()
    os.utime(abandoned, (0, abandoned.stat().st_mtime - 2 * YOUNG_S))
    os.close(killed_lock)  # as the kernel does when its holder is killed
    _, lock = new_scratch()
    assert [folder.exists() for folder in (killed, living, being_made, abandoned, foreign)] == [
        False,
        True,
        True,
        False,
        True,
    ]
    assert (living / LOCK).exists()
    os.close(living_lock)
    os.close(lock)


def test_rays_sockets_fit_wherever_tmpdir_leads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = tmp_path / ("a-folder-per-job-" * 4)
    deep.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    folder, lock = new_scratch()
    try:
        assert len(str(folder)) <= LONGEST
        assert len(f"{folder}{RAY_SOCKET}") <= 107
    finally:
        os.close(lock)
        shutil.rmtree(folder)
