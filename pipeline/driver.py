"""Starts and ends the Ray cluster of a run on this machine, and one TorchTrainer per job; restarts what fails.

A worker that dies is replaced and the run goes on from the newest checkpoint. Restarts are bounded by lack of progress:
a newly committed checkpoint, stage or evaluation resets the count. What a restart cannot mend (a ValueError: bad data,
an impossible recipe) stops the run at once. Nothing is left behind: the cluster's processes die with the driver.
"""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
import torch
from ray._raylet import AuthenticationTokenLoader, Config  # pyright: ignore[reportAttributeAccessIssue]
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from pipeline import checkpoint
from pipeline.lease import Leases
from pipeline.phases import Stage, stages_of
from pipeline.recipe import Recipe
from pipeline.recipe_file import load_recipe

log = logging.getLogger(__name__)

OBJECT_STORE_BYTES = 128 * 1024 * 1024
"""Nothing large goes through Ray: images come from FFCV, weights through the run directory."""
COLLECTIVE_TIMEOUT_S = 600
"""A peer that is silent for longer than this is taken for dead."""


class RunFailed(RuntimeError):
    """The run stopped; the message says where, why and how to go on."""


def unfinished(run_folder: Path, recipe: Recipe) -> list[Stage]:
    """Stages that still have something to do, evaluation included."""

    def done(stage: Stage) -> bool:
        folder = run_folder / stage.name
        evaluated = not stage.evaluated or (folder / "evaluate" / "pgd.json").exists()
        return evaluated and (folder / "result.json").exists()

    return [stage for stage in stages_of(recipe) if not done(stage)]


def progress_marks(run_folder: Path, recipe: Recipe) -> tuple[int, ...]:
    """Grows whenever something was committed: a checkpoint, a result, an evaluation."""
    marks = []
    for stage in stages_of(recipe):
        folder = run_folder / stage.name
        marks += [checkpoint.newest_step(folder), int((folder / "result.json").exists())]
        marks.append(int((folder / "evaluate" / "pgd.json").exists()))
    return tuple(marks)


def _reread_ray_settings() -> None:
    """Ray reads authentication mode and token when it is imported; they are known only now."""
    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


@contextmanager
def local_cluster(recipe: Recipe) -> Iterator[Path]:
    """A Ray cluster of this process alone, behind a random token; yields its folder."""
    folder = Path(tempfile.mkdtemp(prefix="hydra-"))  # short and private: Ray's sockets lie in it
    token = folder / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    root = str(Path(__file__).resolve().parent.parent)
    environment = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "RAY_TRAIN_METRICS_ENABLED": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")])),
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    }
    if not _uses_gpu(recipe):
        environment["DS_ACCELERATOR"] = "cpu"
    before = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    _reread_ray_settings()
    terminate = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(
            address="local",
            num_cpus=recipe.workers.count * recipe.workers.threads,
            include_dashboard=False,
            object_store_memory=OBJECT_STORE_BYTES,
            _temp_dir=str(folder),
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
        # The one that Ray's core puts in front aborts the process 3 s later, whether it has cleaned up by then or not.
        signal.signal(signal.SIGTERM, terminate)
        try:
            yield folder
        finally:
            ray.shutdown()
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        shutil.rmtree(folder, ignore_errors=True)


def _user_error(error: BaseException) -> ValueError | None:
    """The ValueError a worker raised, however Ray wrapped it."""
    pending: list[BaseException] = [error]
    seen: set[int] = set()
    while pending:
        current = pending.pop()
        if id(current) in seen:
            continue
        seen.add(id(current))
        if isinstance(current, ValueError):
            return current
        pending += [e for e in getattr(current, "worker_failures", {}).values() if isinstance(e, BaseException)]
        inner = (getattr(current, "cause", None), getattr(current, "_base_exc", None), current.__cause__)
        pending += [e for e in inner if isinstance(e, BaseException)]
    return None


def run(run_folder: Path, observer: str | None = None) -> None:
    """Do what is left of a run. Errors: ValueError for what the user must mend, LeaseHeld, RunFailed."""
    recipe = load_recipe(run_folder / "recipe.yaml")
    stages = unfinished(run_folder, recipe)
    if not stages:
        return
    _check_devices(recipe)
    leases = Leases([run_folder / stage.name for stage in stages])
    try:
        with local_cluster(recipe) as cluster_folder:
            (run_folder / "logs").mkdir(exist_ok=True)
            _fit_until_done(run_folder, recipe, leases.token, cluster_folder, observer)
    except SystemExit:
        raise KeyboardInterrupt from None  # Ray's handler of SIGINT exits; callers expect Python's own way
    finally:
        leases.release()


def _uses_gpu(recipe: Recipe) -> bool:
    return recipe.workers.device != "cpu" and torch.cuda.is_available()


def _check_devices(recipe: Recipe) -> None:
    """Raise ValueError where Ray would wait for devices that this machine does not have."""
    devices = torch.cuda.device_count()
    if _uses_gpu(recipe) and recipe.workers.count > devices:
        raise ValueError(
            f"workers.count {recipe.workers.count}: this machine has {devices} GPUs, and every worker takes one; "
            "lower workers.count, or set workers.device=cpu"
        )


def _work(order: dict[str, Any]) -> None:
    from pipeline.worker import work  # DeepSpeed, FFCV and wandb take seconds to import and only workers need them

    work(**order)


def _fit_until_done(run_folder: Path, recipe: Recipe, token: str, cluster_folder: Path, observer: str | None) -> None:
    use_gpu = _uses_gpu(recipe)
    without_progress, marks = 0, progress_marks(run_folder, recipe)
    attempt = 0
    while stages := unfinished(run_folder, recipe):
        attempt += 1
        order = {
            "run_folder": str(run_folder.resolve()),
            "token": token,
            "stages": [stage.name for stage in stages],
            "observer": observer,
        }
        trainer = TorchTrainer(
            _work,
            train_loop_config=order,
            torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo", timeout_s=COLLECTIVE_TIMEOUT_S),
            scaling_config=ScalingConfig(
                num_workers=recipe.workers.count,
                use_gpu=use_gpu,
                resources_per_worker={"CPU": recipe.workers.threads, **({"GPU": 1} if use_gpu else {})},
            ),
            run_config=RunConfig(
                name=f"attempt-{attempt}",
                storage_path=str(cluster_folder / "train"),
                failure_config=FailureConfig(max_failures=0, controller_failure_limit=0),
            ),
        )
        try:
            trainer.fit()
        except Exception as error:
            user_error = _user_error(error)
            if user_error is not None:
                raise user_error from None
            marks, before = progress_marks(run_folder, recipe), marks
            without_progress = 0 if marks != before else without_progress + 1
            reason = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
            if without_progress > recipe.workers.restarts_without_progress:
                raise RunFailed(
                    f"{run_folder}: failed {without_progress} times in a row without a new checkpoint; last: {reason}. "
                    f"See {run_folder}/logs/, then: python -m launch resume {run_folder}"
                ) from error
            log.warning("%s: workers failed (%s); restarting from the newest checkpoint", run_folder.name, reason)
            with (run_folder / "logs" / "restarts.log").open("a") as stream:
                stream.write(f"attempt {attempt} failed: {error}\n")
