"""Connects the driver of a SLURM job to the Ray cluster that the job's nodes have started."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import ray

from launch.ray_cluster.connect import connect_to_ray, environment_set
from launch.ray_cluster.environment import ray_environment
from launch.slurm.control_files import ControlFiles
from launch.slurm.nodes import node_advice, workers_for
from pipeline.recipe.schema import Recipe
from pipeline.recipe.slurm import Slurm
from pipeline.training.driver import Cluster, RunFailed, uses_gpu


@contextmanager
def joined_cluster(recipe: Recipe, control: ControlFiles, generation: int, hosts: Sequence[str]) -> Iterator[Cluster]:
    """The cluster that a job's nodes `hosts` have started, once all of them have joined.

    Its number of workers is `workers_for`. Errors: NodesMissing naming the nodes that did not join.
    """
    assert recipe.slurm is not None
    workers = workers_for(recipe, len(hosts))
    address = control.address(generation)
    scratch = Path(os.environ["TMPDIR"])  # set by the node task: the reaper's folder
    with environment_set(ray_environment(control.token, scratch, uses_gpu(recipe))):
        try:
            connect_to_ray(address=address)
        except RunFailed as error:  # its head or a node may have died; the leader starts another cluster
            raise NodesMissing(str(error)) from error
        try:
            _wait_for_nodes(hosts, recipe.slurm)
            yield Cluster(workers, scratch, len(hosts))
        finally:
            ray.shutdown()


class NodesMissing(RuntimeError):
    """Not all nodes of the job have joined Ray in time; another attempt may succeed."""


def _wait_for_nodes(hosts: Sequence[str], slurm: Slurm) -> None:
    """Return when all nodes have joined Ray: each provides a resource named after its number."""
    end, pause = time.monotonic() + slurm.node_start_s, threading.Event()
    while missing := [host for n, host in enumerate(hosts) if f"node_{n}" not in ray.cluster_resources()]:
        if time.monotonic() > end:
            raise NodesMissing(
                f"of {len(hosts)} nodes, {', '.join(missing)} did not join Ray in {slurm.node_start_s} s; "
                f"{node_advice(missing, slurm)}"
            )
        pause.wait(0.5)
