"""When a driver starts its workers again and when it gives up, with Ray's trainer replaced by a script of attempts."""

from __future__ import annotations

import errno
import itertools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from ray.exceptions import RayActorError
from ray.train import ControllerError, WorkerGroupError
from ray.train.v2._internal.exceptions import (
    UserExceptionWithTraceback,
    WorkerGroupStartupTimeoutError,
    WorkerHealthCheckFailedError,
    WorkerHealthCheckTimeoutError,
)

from pipeline.distributed import failure_text
from pipeline.recipe.file import dump_recipe, load_recipe
from pipeline.recipe.schema import Recipe
from pipeline.recipe.stages import stages_of
from pipeline.run import failures
from pipeline.run.failures import Failure, record_failure
from pipeline.run.layout import StageFolder
from pipeline.training import driver
from pipeline.training.driver import Cluster, RunFailed, RunRequest
from tests.support.small_recipe import small_recipe

Attempt = Callable[[Path, str], None]
"""The workers of one attempt, called with the run directory and the attempt's name: return, or raise as Ray does."""
STEP = 7


def says(error: Exception, *others: Exception) -> Attempt:
    """The first worker raises an exception of its own, and writes it down; Ray reports the fate of the others."""

    def attempt(folder: Path, name: str) -> None:
        record_failure(folder, Failure(name, 0, "pretrain", STEP, failure_text(error)))
        raise WorkerGroupError("why", dict(enumerate([UserExceptionWithTraceback(error, "where"), *others])))

    return attempt


def killed(folder: Path, name: str) -> None:
    """All workers at once, so that nothing is written down."""
    raise WorkerGroupError("why", {0: WorkerHealthCheckFailedError("no answer", RayActorError())})


def does_not_start(folder: Path, name: str) -> None:
    raise ControllerError(WorkerGroupStartupTimeoutError(1))


def commits_and_is_killed(folder: Path, name: str) -> None:
    step = folder / "pretrain" / "step-0000000009"
    step.mkdir()
    (step / "MANIFEST.json").touch()
    killed(folder, name)


def finishes(folder: Path, name: str) -> None:
    for stage in stages_of(load_recipe(folder / "recipe.yaml")):
        (folder / stage.name / "result.json").touch()
        for evaluation in stage.evaluations:
            path = StageFolder(folder / stage.name).evaluation(evaluation)
            path.parent.mkdir(exist_ok=True)
            path.touch()


def run_script(folder: Path, monkeypatch: pytest.MonkeyPatch, limit: int, *attempts: Attempt) -> None:
    """A run whose attempts are given, `restarts_without_progress` too. Errors: as `driver.run`; AssertionError if it
    makes fewer attempts."""
    recipe = small_recipe(folder, workers={"restarts_without_progress": limit})
    (folder / "logs").mkdir(exist_ok=True)
    (folder / "recipe.yaml").write_text(dump_recipe(recipe))
    left = list(attempts)

    def trainer(order: RunRequest, recipe: Recipe, token: str, cluster: Cluster, attempt: str) -> SimpleNamespace:
        if not left:
            pytest.fail("an attempt too many")
        act = left.pop(0)
        return SimpleNamespace(fit=lambda: act(folder, attempt))

    def connect(recipe: Recipe) -> AbstractContextManager[Cluster]:
        return nullcontext(Cluster(1, folder))

    monkeypatch.setattr(driver, "_trainer", trainer)
    for name in ("HEALTH_CHECK", "GROUP_START"):  # which the driver sets: here they are put back
        monkeypatch.setenv(f"RAY_TRAIN_WORKER_{name}_TIMEOUT_S", "1")
    try:
        driver.run_driver(RunRequest(folder), connect)
    finally:
        assert not left, "it gave up too soon"


ALLOCATED = itertools.count(1)


def oom() -> RuntimeError:
    """What torch raises; its numbers differ from one time to the next."""
    return torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {next(ALLOCATED)}.00 MiB. GPU 0 has a total")


@pytest.mark.parametrize("limit", [0, 2])
def test_restarts_without_progress_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    words = f"failed {limit + 1} times in a row without a new checkpoint; last: .*python -m launch resume"
    with pytest.raises(RunFailed, match=words):
        run_script(tmp_path, monkeypatch, limit, *[killed] * (limit + 1))
    assert (tmp_path / "logs" / "restarts.log").read_text().count(" failed: ") == limit + 1


def test_a_new_checkpoint_resets_the_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_script(tmp_path, monkeypatch, 2, killed, killed, commits_and_is_killed, killed, killed, finishes)


def test_the_same_exception_at_the_same_step_twice_stops_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = (
        f"pretrain failed twice in the same way at step {STEP}, .* cannot fix it: OutOfMemoryError: the GPU is out of "
        "memory; lower batch.micro_batch"
    )
    with pytest.raises(RunFailed, match=words):
        run_script(tmp_path, monkeypatch, 9, says(oom()), says(oom()))


def test_another_exception_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_script(tmp_path, monkeypatch, 9, says(oom()), says(OSError("stale")), says(oom()), finishes)


def test_a_killed_attempt_between_them_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether or not its survivors recorded a failure."""
    survivor = says(RuntimeError("connection closed by peer"), RayActorError())
    with pytest.raises(RunFailed, match="failed twice in the same way"):
        run_script(tmp_path, monkeypatch, 9, says(oom()), killed, survivor, says(oom()))


@pytest.mark.parametrize(
    "death",
    [RayActorError(), WorkerHealthCheckFailedError("gone", RayActorError()), WorkerHealthCheckTimeoutError("frozen")],
    ids=lambda death: type(death).__name__,
)
def test_what_workers_say_when_another_was_killed_is_no_exception_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, death: Exception
) -> None:
    survivor = says(RuntimeError("connection closed by peer"), death)
    with pytest.raises(RunFailed, match="failed 3 times in a row without a new checkpoint"):
        run_script(tmp_path, monkeypatch, 2, survivor, survivor, survivor)


def test_what_an_earlier_start_ended_with_is_not_said_of_this_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cause was fixed and the run resumed; then its workers find no place at first. If it was not fixed, one
    more time is enough."""
    with pytest.raises(RunFailed, match="failed twice"):
        run_script(tmp_path, monkeypatch, 9, says(oom()), says(oom()))
    with pytest.raises(RunFailed, match="failed 1 times in a row"):
        run_script(tmp_path, monkeypatch, 0, does_not_start)
    with pytest.raises(RunFailed, match="failed twice"):
        run_script(tmp_path, monkeypatch, 9, says(oom()))


def test_a_users_mistake_stops_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"^a damaged image$"):
        run_script(tmp_path, monkeypatch, 9, says(ValueError("a damaged image")))


def test_a_full_disk_does_not_keep_a_run_from_being_restarted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(_: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "logs").mkdir()
    monkeypatch.setattr(failures, "open_to_append", full)
    run_script(tmp_path, monkeypatch, 2, killed, finishes)
    assert "logs/restarts.log cannot be written: [Errno 28] No space left on device" in caplog.text
