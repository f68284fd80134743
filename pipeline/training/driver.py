"""Runs stages with Ray Train on a cluster from `Connect`, and restarts failed workers.

When a worker dies or hangs, all are replaced and the run resumes from the newest checkpoint. Restarts are bounded by
lack of progress: a newly committed checkpoint, stage or evaluation resets the count. Failures that a restart cannot fix
stop the run: a ValueError (bad data, an impossible recipe), and the same exception at the same step twice.
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
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.exceptions import WorkerHealthCheckTimeoutError

from pipeline.distributed import unusable_gpus
from pipeline.recipe.file import recipe_hash
from pipeline.recipe.schema import Recipe
from pipeline.recipe.stages import Stage, stages_of
from pipeline.run.failures import append_to_log, repeated_failure
from pipeline.run.files import make_folder
from pipeline.run.layout import RunFolder, is_done, progress_marks
from pipeline.run.lease import Leases
from pipeline.run.provenance import load_run_recipe
from pipeline.run.stop import StopRequested
from pipeline.training.process_group import GroupConfig

log = logging.getLogger(__name__)

WORKERS_START_S = 300
"""How long new workers may wait for resources that the workers of the previous attempt may still hold."""


class RunFailed(RuntimeError):
    """The run stopped; the message says where, why and how to continue."""


@dataclass(frozen=True)
class Cluster:
    """A Ray cluster that this process is connected to."""

    workers: int
    """Number of workers to start on it."""
    scratch: Path
    """A private folder on this machine for Ray Train's files."""
    machines: int = 1
    """On how many machines it is."""


Connect = Callable[[Recipe], AbstractContextManager[Cluster]]
"""Starts or joins a cluster, for the duration of the context."""


@dataclass(frozen=True)
class RunRequest:
    """What to run, in addition to the run directory."""

    run_folder: Path
    stages: tuple[str, ...] | None = None
    """Names of the stages to run; None means all."""
    stop_file: Path | None = None
    """The run stops with a checkpoint once this file exists."""
    lease_patience_s: float = 0.0
    """How long to wait for a lease that another process holds before that is an error."""
    recipe_sha256: str | None = None
    """`recipe_hash` of the recipe to run: another start may have replaced it meanwhile."""
    observer: str | None = None
    """'module:function', called with events on every worker (for tests)."""


def stages_left(request: RunRequest, recipe: Recipe) -> list[Stage]:
    """The requested stages that are not done, evaluation included."""
    requested = [s for s in stages_of(recipe) if request.stages is None or s.name in request.stages]
    return [stage for stage in requested if not is_done(request.run_folder, stage)]


def run_driver(request: RunRequest, connect: Connect) -> None:
    """Run the stages of a request that are not done.

    Errors: ValueError for what the user must fix, LeaseHeld, RunFailed; StopRequested after stopping on request.
    """
    recipe = load_run_recipe(request.run_folder)
    stages = stages_left(request, recipe)
    if not stages:
        return
    leases = Leases([request.run_folder / stage.name for stage in stages], request.lease_patience_s)
    try:
        _check_same_recipe(request, recipe)
        make_folder(RunFolder(request.run_folder).logs)
        # Ray's own deadlines, for workers that do not answer (such as frozen ones), and for starting workers.
        os.environ["RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"] = str(recipe.workers.hang_timeout_s)
        os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(WORKERS_START_S)
        if recipe.workers.device == "auto" and (reason := unusable_gpus()) is not None:
            log.warning("training on the CPU, as %s", reason)
        with connect(recipe) as cluster:
            _fit_until_done(request, recipe, leases.token, cluster)
    except SystemExit:
        raise KeyboardInterrupt from None  # Ray's SIGINT handler exits; callers expect KeyboardInterrupt
    finally:
        leases.release()


def _check_same_recipe(request: RunRequest, recipe: Recipe) -> None:
    """While nothing is trained, another start may replace the recipe, but not once there are leases."""
    now = recipe_hash(load_run_recipe(request.run_folder))
    if not now == recipe_hash(recipe) == (request.recipe_sha256 or now):
        raise ValueError(f"{request.run_folder}: another start has replaced its recipe; choose another --name")


def uses_gpu(recipe: Recipe) -> bool:
    """Whether workers train on GPUs, one each."""
    return recipe.workers.device != "cpu" and torch.cuda.is_available()


def _run_worker(arguments: dict[str, Any]) -> None:
    # DeepSpeed, FFCV and wandb take seconds to import, and only workers need them.
    from pipeline.training.worker import run_worker

    run_worker(**arguments)


def _trainer(request: RunRequest, recipe: Recipe, token: str, cluster: Cluster, attempt: str) -> TorchTrainer:
    gpu = uses_gpu(recipe)
    return TorchTrainer(
        _run_worker,
        train_loop_config={
            "run_folder": str(request.run_folder.resolve()),
            "token": token,
            "attempt": attempt,
            "stages": [stage.name for stage in stages_left(request, recipe)],
            "stop_file": str(request.stop_file) if request.stop_file else None,
            "observer": request.observer,
        },
        torch_config=GroupConfig(
            backend="nccl" if gpu else "gloo",
            timeout_s=int(recipe.workers.hang_timeout_s),
            store=str(cluster.scratch / f"store-{attempt}") if cluster.machines == 1 else None,
        ),
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


def _fit_until_done(request: RunRequest, recipe: Recipe, token: str, cluster: Cluster) -> None:
    folder = request.run_folder
    names = [stage.name for stage in stages_left(request, recipe)]
    without_progress, marks = 0, progress_marks(folder, names)
    killed: list[str] = []
    hint = f"See {folder}/logs/, then: python -m launch resume {folder}"
    while stages_left(request, recipe):
        attempt = secrets.token_hex(4)
        try:
            _trainer(request, recipe, token, cluster, attempt).fit()
        except Exception as error:
            user_error = _user_error(error)
            if user_error is not None:
                raise user_error from None
            reason = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
            append_to_log(folder, "restarts.log", f"attempt {attempt} failed: {error}\n")
            if _worker_died(error):
                killed.append(attempt)
            elif (failure := repeated_failure(folder, attempt, killed)) is not None:
                raise RunFailed(
                    f"{folder}: {failure.stage} failed twice in the same way at step {failure.step}, so a restart "
                    f"cannot fix it: {failure.error}. {hint}"
                ) from error
            previous, marks = marks, progress_marks(folder, names)
            without_progress = 0 if marks != previous else without_progress + 1
            if without_progress > recipe.workers.restarts_without_progress:
                raise RunFailed(
                    f"{folder}: failed {without_progress} times in a row without a new checkpoint; last: {reason}. "
                    f"{hint}"
                ) from error
            log.warning("%s: workers failed (%s); restarting from the newest checkpoint", folder.name, reason[:300])
        else:
            if request.stop_file is not None and request.stop_file.exists() and stages_left(request, recipe):
                raise StopRequested(f"{folder} stopped on request. {hint}")


def _causes(error: BaseException) -> list[BaseException]:
    """An exception and all its causes, through Ray's wrappers."""
    pending: list[BaseException] = [error]
    causes: list[BaseException] = []
    while pending:
        current = pending.pop()
        if any(current is cause for cause in causes):
            continue
        causes.append(current)
        pending += [e for e in getattr(current, "worker_failures", {}).values() if isinstance(e, BaseException)]
        inner = [getattr(current, name, None) for name in ("cause", "_base_exc", "health_check_failure", "__cause__")]
        pending += [e for e in inner if isinstance(e, BaseException)]
    return causes


def _user_error(error: BaseException) -> ValueError | None:
    """The ValueError that a worker raised, if any."""
    return next((cause for cause in _causes(error) if isinstance(cause, ValueError)), None)


def _worker_died(error: BaseException) -> bool:
    """Whether a worker ended without an exception of its own: killed, frozen, or lost with its node."""
    return any(isinstance(cause, (RayActorError, WorkerHealthCheckTimeoutError)) for cause in _causes(error))
