"""One TorchTrainer per job on a Ray cluster that somebody else has started; restarts what fails.

A worker that dies or hangs is replaced and the run goes on from the newest checkpoint. Restarts are bounded by lack of
progress: a newly committed checkpoint, stage or evaluation resets the count. What a restart cannot mend stops the run:
a ValueError (bad data, an impossible recipe), and the same exception at the same step twice.
"""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from ray.exceptions import RayActorError
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.exceptions import WorkerHealthCheckTimeoutError

from pipeline.recipe.file import load_recipe
from pipeline.recipe.schema import Recipe
from pipeline.recipe.stages import Stage, stages_of
from pipeline.run.failures import append_to_log, repeated_failure
from pipeline.run.layout import RunFolder, is_done, progress_marks
from pipeline.run.lease import Leases
from pipeline.run.stop import StopRequested

log = logging.getLogger(__name__)

WORKERS_START_S = 300
"""How long the workers of an attempt may wait for their places, which those of the attempt before may still hold."""


class RunFailed(RuntimeError):
    """The run stopped; the message says where, why and how to go on."""


@dataclass(frozen=True)
class Cluster:
    """A Ray cluster that this process is connected to."""

    workers: int
    """How many workers it is for."""
    scratch: Path
    """A folder of this run alone, for what Ray Train wants to keep."""


Connect = Callable[[Recipe], AbstractContextManager[Cluster]]
"""Starts a cluster, or joins one, for as long as the context lasts."""


@dataclass(frozen=True)
class RunRequest:
    """What is to be done, apart from what the run directory says."""

    run_folder: Path
    stages: tuple[str, ...] | None = None
    """Names of the stages to do; None means all of them."""
    stop_file: Path | None = None
    """The run stops with a checkpoint once this file is there."""
    lease_patience_s: float = 0.0
    """How long a stage may still be held by another writer before that is an error."""
    observer: str | None = None
    """'module:function', which is called at every step on every worker (tests)."""


def stages_left(order: RunRequest, recipe: Recipe) -> list[Stage]:
    """Stages of the order that still have something to do, evaluation included."""
    ours = [s for s in stages_of(recipe) if order.stages is None or s.name in order.stages]
    return [stage for stage in ours if not is_done(order.run_folder, stage)]


def run_driver(order: RunRequest, connect: Connect) -> None:
    """Do what is left of an order.

    Errors: ValueError for what the user must mend, LeaseHeld, RunFailed, StopRequested once it has stopped as asked.
    """
    recipe = load_recipe(RunFolder(order.run_folder).recipe)
    stages = stages_left(order, recipe)
    if not stages:
        return
    leases = Leases([order.run_folder / stage.name for stage in stages], order.lease_patience_s)
    try:
        RunFolder(order.run_folder).logs.mkdir(exist_ok=True)
        # Ray's own deadlines, for workers that do not answer, such as one that was frozen, and for those that start.
        os.environ["RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"] = str(recipe.workers.hang_timeout_s)
        os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(WORKERS_START_S)
        with connect(recipe) as cluster:
            _fit_until_done(order, recipe, leases.token, cluster)
    except SystemExit:
        raise KeyboardInterrupt from None  # Ray's handler of SIGINT exits; callers expect Python's own way
    finally:
        leases.release()


def uses_gpu(recipe: Recipe) -> bool:
    """Whether workers train on GPUs, one each."""
    return recipe.workers.device != "cpu" and torch.cuda.is_available()


def _work(arguments: dict[str, Any]) -> None:
    from pipeline.training.worker import (
        work,  # DeepSpeed, FFCV and wandb take seconds to import and only workers need them
    )

    work(**arguments)


def _trainer(order: RunRequest, recipe: Recipe, token: str, cluster: Cluster, attempt: str) -> TorchTrainer:
    gpu = uses_gpu(recipe)
    return TorchTrainer(
        _work,
        train_loop_config={
            "run_folder": str(order.run_folder.resolve()),
            "token": token,
            "attempt": attempt,
            "stages": [stage.name for stage in stages_left(order, recipe)],
            "stop_file": str(order.stop_file) if order.stop_file else None,
            "observer": order.observer,
        },
        torch_config=TorchConfig(backend="nccl" if gpu else "gloo", timeout_s=int(recipe.workers.hang_timeout_s)),
        scaling_config=ScalingConfig(
            num_workers=cluster.workers,
            use_gpu=gpu,
            resources_per_worker={"CPU": recipe.workers.threads, **({"GPU": 1} if gpu else {})},
        ),
        run_config=RunConfig(
            name=attempt,
            storage_path=str(cluster.scratch / "train"),
            failure_config=FailureConfig(max_failures=0, controller_failure_limit=0),
        ),
    )


def _fit_until_done(order: RunRequest, recipe: Recipe, token: str, cluster: Cluster) -> None:
    folder = order.run_folder
    ours = [stage.name for stage in stages_left(order, recipe)]
    without_progress, marks = 0, progress_marks(folder, ours)
    killed: list[str] = []
    go_on = f"See {folder}/logs/, then: python -m launch resume {folder}"
    while stages_left(order, recipe):
        attempt = secrets.token_hex(4)
        try:
            _trainer(order, recipe, token, cluster, attempt).fit()
        except Exception as error:
            user_error = _user_error(error)
            if user_error is not None:
                raise user_error from None
            reason = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
            append_to_log(folder, "restarts.log", f"attempt {attempt} failed: {error}\n")
            if _somebody_died(error):
                killed.append(attempt)
            elif (twice := repeated_failure(folder, attempt, killed)) is not None:
                raise RunFailed(
                    f"{folder}: {twice.stage} failed twice in the same way at step {twice.step}, so that a restart "
                    f"cannot mend it: {twice.error}. {go_on}"
                ) from error
            marks, before = progress_marks(folder, ours), marks
            without_progress = 0 if marks != before else without_progress + 1
            if without_progress > recipe.workers.restarts_without_progress:
                raise RunFailed(
                    f"{folder}: failed {without_progress} times in a row without a new checkpoint; last: {reason}. "
                    f"{go_on}"
                ) from error
            log.warning("%s: workers failed (%s); restarting from the newest checkpoint", folder.name, reason[:300])
        else:
            if order.stop_file is not None and order.stop_file.exists() and stages_left(order, recipe):
                raise StopRequested(f"{folder} was asked to stop; {go_on}")


def _causes(error: BaseException) -> list[BaseException]:
    """An exception and all that it came from, however Ray wrapped them."""
    pending: list[BaseException] = [error]
    causes: list[BaseException] = []
    while pending:
        current = pending.pop()
        if any(current is known for known in causes):
            continue
        causes.append(current)
        pending += [e for e in getattr(current, "worker_failures", {}).values() if isinstance(e, BaseException)]
        inner = [getattr(current, name, None) for name in ("cause", "_base_exc", "health_check_failure", "__cause__")]
        pending += [e for e in inner if isinstance(e, BaseException)]
    return causes


def _user_error(error: BaseException) -> ValueError | None:
    """The ValueError a worker raised."""
    return next((cause for cause in _causes(error) if isinstance(cause, ValueError)), None)


def _somebody_died(error: BaseException) -> bool:
    """Whether a worker ended without an exception of its own: killed, frozen, or lost with its node."""
    return any(isinstance(cause, (RayActorError, WorkerHealthCheckTimeoutError)) for cause in _causes(error))
