"""Attempts on a real Ray cluster: what is counted, what resets the count, and what stops a run at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.run import checkpoint
from pipeline.run.failures import read_failures
from tests.fault.cuts import Cut, done_cuts, set_cuts
from tests.support.commands import Command
from tests.support.small_recipe import two_worker_recipe
from tests.support.undisturbed_run import new_run

DEADLINE_S = 600
STEP = 26  # checkpoints are due at 9 and 18; the second starts once the first is committed
CUTS: list[Cut] = [
    ("step", "pretrain", 3, "worker"),  # the one restart without progress that is allowed
    ("step", "pretrain", STEP, "exception"),  # a checkpoint was committed, so the run continues
    ("step", "pretrain", STEP, "worker"),  # at the same step, but killed
    ("step", "pretrain", STEP, "exception"),
]


@pytest.mark.timeout(900)
def test_a_checkpoint_resets_the_count_and_the_same_exception_twice_stops_the_run(
    fashion_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = new_run(tmp_path / "run", two_worker_recipe(fashion_data, restarts_without_progress=1))
    set_cuts(folder, CUTS)
    monkeypatch.setenv("HYDRA_TEST_RUN", str(folder))
    command = Command(tmp_path, str(folder), "tests.fault.cuts:cut", module="tests.fault.run_observed")
    ended = command.finish(DEADLINE_S)
    assert ended.code == 1
    words = f"error: {folder}: pretrain failed twice in the same way at step {STEP}, so a restart cannot fix it: "
    assert f"{words}Mishap: as the test asked for. See " in ended.err, ended.err
    assert "Traceback" not in ended.err
    assert done_cuts(folder) == len(CUTS)
    assert (folder / "logs" / "restarts.log").read_text().count(" failed: ") == len(CUTS)
    mishaps = [failure for failure in read_failures(folder) if "Mishap" in failure.error]
    assert [(failure.rank, failure.stage, failure.step) for failure in mishaps] == [(1, "pretrain", STEP)] * 2
    kept = checkpoint.read_newest_checkpoint(folder / "pretrain")
    assert kept is not None
    assert kept.progress.step in (9, 18), "the second may have been under way when its writer was killed"
