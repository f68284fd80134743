"""Ray clusters for one run: started on this machine, or joined inside a SLURM allocation. Nothing of them stays."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
import torch
from ray._raylet import AuthenticationTokenLoader, Config  # pyright: ignore[reportAttributeAccessIssue]

from launch.ray_cluster.environment import OBJECT_STORE_BYTES, ray_environment, write_token
from launch.ray_cluster.reaper import CLUSTER_MARK, Reaper
from pipeline.recipe.schema import Recipe
from pipeline.training.driver import Cluster, RunFailed, uses_gpu


@contextmanager
def environment_set(values: dict[str, str]) -> Iterator[None]:
    """Set in this process, known to Ray, and put back."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    # Ray reads authentication mode and token when it is imported; they are known only now.
    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def connect_to_ray(**arguments: Any) -> None:
    terminate = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(log_to_driver=False, logging_level=logging.ERROR, **arguments)
    except Exception as error:  # Ray gives its daemons 30 s, and says in many ways that they were not enough
        reason = " ".join(str(error).split())[:300]
        raise RunFailed(
            f"Ray did not start ({reason}); is the machine overloaded or out of memory? Nothing was lost: give the "
            "command again"
        ) from error
    # The one that Ray's core puts in front aborts the process 3 s later, whether it has cleaned up by then or not.
    signal.signal(signal.SIGTERM, terminate)


def _check_devices(recipe: Recipe) -> None:
    """Errors: ValueError where Ray would wait for devices that this machine does not have."""
    devices = torch.cuda.device_count()
    if uses_gpu(recipe) and recipe.workers.count > devices:
        raise ValueError(
            f"workers.count {recipe.workers.count}: this machine has {devices} GPUs, and every worker takes one; "
            "lower workers.count, or set workers.device=cpu"
        )


@contextmanager
def local_cluster(recipe: Recipe) -> Iterator[Cluster]:
    """A Ray cluster of this process alone, behind a random token."""
    _check_devices(recipe)
    guard = Reaper()
    folder = guard.folder
    try:
        write_token(folder / "token")
        environment = ray_environment(folder / "token", folder, uses_gpu(recipe)) | {CLUSTER_MARK: guard.mark}
        with environment_set(environment):
            connect_to_ray(
                address="local",
                num_cpus=recipe.workers.count * recipe.workers.threads,
                include_dashboard=False,
                object_store_memory=OBJECT_STORE_BYTES,
                _temp_dir=str(guard.ray_folder),
            )
            try:
                yield Cluster(recipe.workers.count, folder)
            finally:
                ray.shutdown()
    finally:
        guard.close()
