"""A disk that fills up at any moment loses only unfinished work; with room again the run ends as an undisturbed one."""

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


def _start(faults: Faults, context: RunContext, full_from: int) -> Attempt:
    """A start of a run with a disk that is full from a call on; there is room again after it."""
    faults.begin(context.run_folder, full_from, errno.ENOSPC, True)
    message, code = "", None
    try:
        run_stages(context, stages_of(context.recipe))
    except Exception as error:
        message, code = f"{type(error).__name__}: {error}", getattr(error, "errno", None)
    return faults.end(), message, code


def _starts(
    group: Group, recipe: Recipe, token: str, counted: Path, full: Path
) -> tuple[Attempt, list[Attempt], list[list[int]]]:
    """In one process: a start of `counted` with room for all, and starts of `full` until one finishes; what was
    committed before and after each of those."""
    faults, chance = Faults(), random.Random(SEED)
    first = _start(faults, RunContext(recipe, counted, token, group), NEVER)
    attempts: list[Attempt] = []
    committed = [_committed(full, recipe)]
    while len(attempts) < 4 * PARTS and (not attempts or attempts[-1][1]):
        full_from = chance.randrange(2 * first[0] // PARTS)
        attempts.append(_start(faults, RunContext(recipe, full, token, group), full_from))
        committed.append(_committed(full, recipe))
    return first, attempts, committed


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
    counted, folder = (new_run(tmp_path / name, recipe) for name in ("counted", "full"))
    leases = Leases([run / stage.name for run in (counted, folder) for stage in stages_of(recipe)])
    try:
        (first, attempts, committed), *_ = run_group(
            1, _starts, recipe, leases.token, counted, folder, deadline_s=500, fresh=True
        )
    finally:
        leases.release()
    calls, message, _ = first
    assert (calls > 100, message) == (True, "")
    assert unlike(recipe, calm, counted) == []
    for attempt, before, after in zip(attempts, committed, committed[1:], strict=False):
        assert all(now >= then for now, then in zip(after, before, strict=True)), (before, after, attempt)
    *full, (_, last, _) = attempts
    assert last == ""
    assert len(full) >= PARTS // 2
    for _, message, code in full:
        assert code == errno.ENOSPC, message
        assert str(folder) in message, message
    assert unlike(recipe, calm, folder) == []
