"""A Ray cluster that is started, runs one task in a worker, and ends: `python -m launch.ray_cluster.trial FOLDER`.

It starts as the driver of a local run does; FOLDER is its reaper's. Standard error says why it failed.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from launch.ray_cluster.environment import LOOPBACK
from launch.ray_cluster.reaper import CLUSTER_MARK, Reaper
from launch.ray_cluster.scratch import python_for_ray


def run_trial(deadline_s: float) -> str | None:
    """Start and end a cluster; None if that went well, or else the reason. Nothing of it is left.

    Errors: ValueError if Ray cannot start this Python.
    """
    reaper = Reaper()
    try:
        done = subprocess.run(
            [python_for_ray(reaper.folder), "-m", "launch.ray_cluster.trial", str(reaper.folder)],
            env={**os.environ, **LOOPBACK, CLUSTER_MARK: reaper.mark},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            timeout=deadline_s,
        )
    except subprocess.TimeoutExpired:
        return f"it did not start, run a task and stop in {deadline_s:g} s"
    finally:
        reaper.close()
    if done.returncode == 0:
        return None
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    return lines[-1] if lines else f"its driver ended with {done.returncode}"


def main(folder: str) -> int:
    """The driver."""
    import ray

    from launch.ray_cluster.connect import ray_on_this_machine
    from pipeline.training.driver import RunFailed

    @ray.remote
    def process_id() -> int:
        return os.getpid()

    try:
        with ray_on_this_machine(Path(folder), cpus=1, gpu=False):
            worker = ray.get(process_id.remote())
    except RunFailed as error:
        print(error, file=sys.stderr)
        return 1
    return 0 if worker != os.getpid() else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
