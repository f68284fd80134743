"""A disk that is full from any moment on costs what was under way; with room again the run ends as a calm one."""

from __future__ import annotations

import errno
import random
from pathlib import Path

import pytest

from pipeline.distributed import Group
from pipeline.recipe.schema import Recipe
from pipeline.recipe.stages import stages_of
from pipeline.run.layout import progress_marks
from pipeline.run.lease import Leases
from pipeline.training.context import RunContext
from pipeline.training.stage import run_stages
from tests.fault.final_state import unlike
from tests.support.failing_calls import Faults, build_library
from tests.support.processes import run_group
from tests.support.small_recipe import small_recipe
from tests.support.undisturbed_run import calm_run, new_run

SEED = 20261127
NEVER = 10**9
PARTS = 6
"""A start gets through one of so many parts of the run's calls, on average, until the disk is full."""
Attempt = tuple[int, str, int | None]
"""(calls about files of the run, what the start ended with, its errno)"""


def _start(group: Group, recipe: Recipe, folder: Path, token: str, full_from: list[int]) -> list[Attempt]:
    """Starts of a run in one process, each with a disk that is full from a call on; there is room between them."""
    faults, attempts = Faults(), []
    for number in full_from:
        faults.begin(folder, number, errno.ENOSPC, True)
        said, code = "", None
        try:
            run_stages(RunContext(recipe, folder, token, group), stages_of(recipe))
        except Exception as error:
            said, code = f"{type(error).__name__}: {error}", getattr(error, "errno", None)
        attempts.append((faults.end(), said, code))
        if not said:
            break
    return attempts


def _starts(folder: Path, recipe: Recipe, full_from: list[int]) -> list[Attempt]:
    leases = Leases([folder / stage.name for stage in stages_of(recipe)])
    try:
        return run_group(1, _start, recipe, folder, leases.token, full_from)[0]
    finally:
        leases.release()


def _committed(folder: Path, recipe: Recipe) -> list[int]:
    """Of each stage the newest checkpoint, the result, and evaluations; chunks go when their evaluation is there."""
    marks = progress_marks(folder, [stage.name for stage in stages_of(recipe)])
    return [mark for index, mark in enumerate(marks) if index % 4 < 3]


@pytest.mark.timeout(600)
def test_a_full_disk_at_any_moment_loses_nothing(
    fashion_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    phase = {"epochs": 1, "lr": 0.05}
    recipe = small_recipe(
        fashion_data,
        phases={"pretrain": phase, "prune": phase, "finetune": phase},
        sparsity={"baselines": []},
        checkpoint={"every_steps": 9, "keep": 2},
        tracking={"log_every_steps": 2},
    )
    calm = calm_run(tmp_path / "calm", recipe)
    monkeypatch.setenv("LD_PRELOAD", str(build_library(tmp_path)))
    counted = new_run(tmp_path / "counted", recipe)
    ((calls, said, _),) = _starts(counted, recipe, [NEVER])
    assert (calls > 100, said) == (True, "")
    assert unlike(recipe, calm, counted) == []

    chance = random.Random(SEED)
    folder = new_run(tmp_path / "full", recipe)
    attempts: list[Attempt] = []
    while len(attempts) < 4 * PARTS and (not attempts or attempts[-1][1]):
        before = _committed(folder, recipe)
        attempts += _starts(folder, recipe, [chance.randrange(2 * calls // PARTS) for _ in range(3)])
        after = _committed(folder, recipe)
        assert all(now >= then for now, then in zip(after, before, strict=True)), (before, after, attempts[-2:])
    *full, (_, last, _) = attempts
    assert last == ""
    assert len(full) >= PARTS // 2
    for _, said, code in full:
        assert code == errno.ENOSPC, said
        assert str(folder) in said, said
    assert unlike(recipe, calm, folder) == []
