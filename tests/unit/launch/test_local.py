"""When a local run starts another Ray cluster and when it gives up, with its drivers replaced by a script of them."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from launch import local
from launch.local import INTERRUPTED, run_here
from launch.ray_cluster.environment import RAY_ENDED
from pipeline.recipe.file import dump_recipe, recipe_hash
from tests.support.small_recipe import small_recipe

Driver = Callable[[Path], int]
"""Called with the run directory; returns the exit code."""


def ray_dies(folder: Path) -> int:
    return RAY_ENDED


def commits_and_ray_dies(folder: Path) -> int:
    step = folder / "pretrain" / "step-0000000009"
    step.mkdir(parents=True)
    (step / "MANIFEST.json").touch()
    return RAY_ENDED


def ends_with(code: int) -> Driver:
    return lambda folder: code


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """`run(limit, *drivers)`: the exit code of a run with these drivers, all of which it starts."""
    monkeypatch.setattr(local, "check_same_data", lambda folder: None)

    def run_drivers(limit: int, *drivers: Driver) -> int:
        recipe = small_recipe(tmp_path, workers={"restarts_without_progress": limit})
        (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe))
        (tmp_path / "logs").mkdir()
        left = list(drivers)
        monkeypatch.setattr(local, "_run_driver", lambda folder, *_: left.pop(0)(folder))
        code = run_here(tmp_path)
        assert left == [], "it gave up too soon"
        return code

    return run_drivers


def test_a_cluster_that_dies_is_replaced(run: Callable[..., int], tmp_path: Path) -> None:
    assert run(1, ray_dies, commits_and_ray_dies, ray_dies, ends_with(0)) == 0
    assert (tmp_path / "logs" / "restarts.log").read_text() == "Ray's processes ended\n" * 3


def test_clusters_that_die_without_progress_are_bounded(
    run: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(2, ray_dies, ray_dies, ray_dies) == 1
    assert "Ray's processes ended 3 times in a row without a new checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize("code", [0, 1, 2])
def test_what_the_driver_says_is_final(run: Callable[..., int], code: int) -> None:
    assert run(9, ends_with(code)) == code


def test_a_driver_that_was_killed_is_not_replaced(run: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    """The kill may have been meant for the run."""
    assert run(9, ends_with(-signal.SIGKILL)) == 1
    assert "its driver was ended by SIGKILL; checkpoints are kept; continue with" in capsys.readouterr().err


def test_an_interrupted_driver_is_an_interrupted_run(run: Callable[..., int]) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(9, ends_with(INTERRUPTED))


def test_a_path_that_the_driver_cannot_use_is_one_line(tmp_path: Path) -> None:
    """A link where its lock would be; the driver is a process of its own, with its own report of errors."""
    recipe = small_recipe(tmp_path)
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe))
    (tmp_path / "pretrain").mkdir()
    (tmp_path / "pretrain" / ".lease.lock").symlink_to(tmp_path / "elsewhere")
    command = [sys.executable, "-m", "launch.local", str(tmp_path), "--scratch", str(tmp_path / "scratch")]
    for sha256, words in ((recipe_hash(recipe), "it is a link"), ("f" * 64, "another start has replaced its recipe")):
        done = subprocess.run([*command, "--recipe-sha256", sha256], capture_output=True, text=True, timeout=280)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
        assert words in done.stderr
        (tmp_path / "pretrain" / ".lease.lock").unlink(missing_ok=True)
    assert not (tmp_path / "elsewhere").exists()


def test_the_waiting_command_has_neither_torch_nor_ray() -> None:
    code = "import sys, launch.local; print([name for name in ('torch', 'ray', 'deepspeed') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
