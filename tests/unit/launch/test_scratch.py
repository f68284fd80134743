"""Temporary folders of clusters: private, short, and removed once their lock is free."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.ray_cluster.environment import ray_environment
from launch.ray_cluster.scratch import LONGEST, MARKER, PREFIX, RAY, new_scratch, python_for_ray
from tests.support.commands import ROOT

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
    os.close(killed_lock)  # as the kernel does when its holder is killed
    _, lock = new_scratch()
    assert [folder.exists() for folder in (killed, living)] == [False, True]
    assert (living / MARKER).exists()
    os.close(living_lock)
    os.close(lock)


def test_only_what_carries_the_marker_is_removed(short: Path) -> None:
    """Whatever its name, age and content: a folder of results called hydra-2024 is the user's."""
    results, empty, foreign = short / f"{PREFIX}2024", short / f"{PREFIX}abcdefgh", short / "other"
    piped, linking = short / f"{PREFIX}piped", short / f"{PREFIX}linking"
    for folder in (results, empty, foreign, piped, linking):
        folder.mkdir()
        os.utime(folder, (0, 0))
    for name in ("lock", "model.pt"):
        (results / name).touch()
    (foreign / MARKER).touch()
    os.mkfifo(piped / MARKER)
    (linking / MARKER).symlink_to(foreign / MARKER)
    target = short / "target"
    target.mkdir()
    (target / MARKER).touch()
    link, file = short / f"{PREFIX}link", short / f"{PREFIX}file"
    link.symlink_to(target)
    file.touch()
    _, lock = new_scratch()
    os.close(lock)
    kept = [results / "lock", results / "model.pt", empty, piped, linking, link, file]
    kept += [foreign / MARKER, target / MARKER]
    assert [path for path in kept if not path.exists()] == []


def test_ray_gets_a_python_without_spaces(short: Path) -> None:
    environment, scratch = short / "my $environment", short / "scratch"
    environment.symlink_to(sys.prefix)
    scratch.mkdir()
    code = (
        "from pathlib import Path; from launch.ray_cluster.scratch import python_for_ray; "
        f"print(python_for_ray(Path({str(scratch)!r})))"
    )
    python = environment / Path(sys.executable).relative_to(sys.prefix)
    first = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert Path(first).is_relative_to(scratch)
    code = (
        "import sys; from importlib.util import find_spec; print(sys.executable); "
        "print(find_spec('ray').origin, find_spec('launch').origin)"
    )
    done = subprocess.run([first, "-c", code], capture_output=True, text=True, check=True)
    executable, packages = done.stdout.splitlines()
    assert executable == first
    assert packages.startswith(f"{scratch}/python/"), packages
    assert packages.endswith(f" {ROOT}/launch/__init__.py")


def test_a_python_that_ray_cannot_start_is_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/opt/my python/bin/python3")
    monkeypatch.setattr(sys, "base_prefix", sys.prefix)
    with pytest.raises(ValueError, match=r"my python/bin/python3': Ray cannot start .* use a virtual environment"):
        python_for_ray(tmp_path)


@pytest.mark.parametrize("name", ["a-folder-per-job-" * 4, "a b"])
def test_rays_sockets_fit_wherever_tmpdir_leads(short: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    place = short / name
    place.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    folder, lock = new_scratch()
    try:
        assert len(str(folder)) <= LONGEST
        assert " " not in str(folder)
        assert len(f"{folder}{RAY_SOCKET}") <= 107
    finally:
        os.close(lock)
        shutil.rmtree(folder)


def test_compiled_code_outlives_the_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless the user names a folder, or has no home: then it is torch's own, in TMPDIR."""
    name, scratch = "TORCHINDUCTOR_CACHE_DIR", tmp_path / "scratch"
    monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    environment = ray_environment(scratch / "token", scratch, gpu=True)
    assert environment["TMPDIR"] == str(scratch)
    assert environment[name] == str(tmp_path / "hydra-pipeline" / "compiled")
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/none/cache")
    assert name not in ray_environment(scratch / "token", scratch, gpu=True)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv(name, "/mine")
    assert name not in ray_environment(scratch / "token", scratch, gpu=True)


def test_a_cluster_without_gpus_sees_none(tmp_path: Path) -> None:
    """Or its workers would take one that its job has not asked for."""
    assert ray_environment(tmp_path / "token", tmp_path, gpu=False)["CUDA_VISIBLE_DEVICES"] == ""
    assert "CUDA_VISIBLE_DEVICES" not in ray_environment(tmp_path / "token", tmp_path, gpu=True)
