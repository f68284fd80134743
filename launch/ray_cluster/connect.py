"""Connects to Ray: a cluster of this process on this machine, or an existing one."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
import torch
from ray._private import worker as ray_worker
from ray._raylet import AuthenticationTokenLoader, Config  # pyright: ignore[reportAttributeAccessIssue]

from launch.ray_cluster.environment import OBJECT_STORE_BYTES, RAY_ENDED, ray_environment, write_token
from launch.ray_cluster.scratch import RAY
from pipeline.recipe.schema import Recipe
from pipeline.training.driver import Cluster, RunFailed, uses_gpu

log = logging.getLogger(__name__)

WATCH_S = 0.5
"""How often a local driver looks whether Ray is alive."""
VITAL = ("gcs_server", "raylet")
"""Ray's names of the processes without which a cluster of one machine is dead."""


@contextmanager
def environment_set(values: dict[str, str]) -> Iterator[None]:
    """Set variables in this process, have Ray re-read them, and restore them on exit."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    # Ray reads the authentication mode and token at import, before they are set.
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
    except Exception as error:  # Ray gives its daemons 30 s, and raises many types after that
        reason = " ".join(str(error).split())[:300]
        raise RunFailed(
            f"Ray did not start ({reason}); is the machine overloaded or out of memory? Nothing was lost: run the "
            "command again"
        ) from error
    # Ray's own handler aborts the process after 3 s, whether it has cleaned up by then or not.
    signal.signal(signal.SIGTERM, terminate)


def _workers_here(recipe: Recipe) -> int:
    """Number of workers to start on this machine: with `device: auto`, no more than it has GPUs, if it has any.

    Errors: ValueError if `device: cuda` needs more GPUs than it has; Ray would wait for them.
    """
    count, gpus = recipe.workers.count, torch.cuda.device_count()
    if not uses_gpu(recipe) or count <= gpus:
        return count
    has = f"this machine has {gpus} GPU{'s' * (gpus != 1)}, and every worker takes one"
    if recipe.workers.device == "cuda":
        raise ValueError(f"workers.count {count}: {has}; lower workers.count, or set workers.device=cpu")
    fewer = recipe.batch.largest_workers(gpus)
    log.warning("workers.count %d: %s; using %d. Results do not depend on it", count, has, fewer)
    return fewer


@contextmanager
def local_cluster(recipe: Recipe, scratch: Path) -> Iterator[Cluster]:
    """A private Ray cluster for a recipe's workers on this machine; see `ray_on_this_machine`."""
    workers = _workers_here(recipe)
    with ray_on_this_machine(scratch, cpus=workers * recipe.workers.threads, gpu=uses_gpu(recipe)):
        yield Cluster(workers, scratch)


@contextmanager
def ray_on_this_machine(scratch: Path, *, cpus: int, gpu: bool) -> Iterator[None]:
    """A private Ray cluster on this machine, protected by a random token in `scratch`, a reaper's folder.

    The process ends with `RAY_ENDED` when Ray's raylet or GCS dies: what it does may then wait for ever, and Ray's own
    code may end it at any time.
    """
    write_token(scratch / "token")
    with environment_set(ray_environment(scratch / "token", scratch, gpu)):
        connect_to_ray(
            address="local",
            num_cpus=cpus,
            include_dashboard=False,
            object_store_memory=OBJECT_STORE_BYTES,
            _temp_dir=str(scratch / RAY),
        )
        shut_down = threading.Event()
        threading.Thread(target=_end_with_ray, args=(shut_down,), name="ray-watch", daemon=True).start()
        try:
            yield
        finally:
            shut_down.set()
            ray.shutdown()


def _end_with_ray(shut_down: threading.Event) -> None:
    node: Any = ray_worker._global_node
    while not shut_down.wait(WATCH_S):
        dead = [kind for kind, _ in node.dead_processes() if kind in VITAL]
        if dead and not shut_down.is_set():
            log.warning("Ray's %s ended", " and ".join(dead))
            os._exit(RAY_ENDED)
