"""The driver inside a SLURM job: joins the Ray cluster that the job's nodes have started, and does the job's stages.

    python -m launch.slurm.driver_main RUN_FOLDER STAGE[,STAGE] CONTROL_FOLDER GENERATION HOST[,HOST] OBSERVER|-

Started by `launch.slurm.node_task`: 0 means done, 75 stopped as asked. Any other end, an unforeseen exception included,
leads to another attempt, unless ended.json says that it would be in vain.
"""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager
from pathlib import Path

from launch.local import run_and_show
from launch.slurm.control_files import ControlFiles
from launch.slurm.joined_cluster import NodesMissing, joined_cluster
from launch.slurm.node_task import STOPPED
from launch.slurm.nodes import unused_workers
from pipeline.recipe.schema import Recipe
from pipeline.run.lease import STALE_AFTER_S
from pipeline.run.stop import StopRequested
from pipeline.training.driver import Cluster, RunFailed, RunRequest

LEASE_PATIENCE_S = STALE_AFTER_S + 30
"""A job that is queued again may begin on another node before its last start's lease there has run out."""


def main(run_folder: str, stages: str, control_folder: str, generation: str, hosts: str, observer: str) -> int:
    """Do the stages; the exit code says what to do next."""
    control, names = ControlFiles(Path(control_folder)), hosts.split(",")
    order = RunRequest(
        Path(run_folder),
        tuple(stages.split(",")),
        control.stop,
        observer=None if observer == "-" else observer,
        lease_patience_s=LEASE_PATIENCE_S,
    )

    def connect(recipe: Recipe) -> AbstractContextManager[Cluster]:
        if (note := unused_workers(recipe, len(names))) is not None:
            print(note, file=sys.stderr)
        return joined_cluster(recipe, control, int(generation), names)

    try:
        run_and_show(order, connect)
    except StopRequested as stopped:
        print(stopped, file=sys.stderr)
        return STOPPED
    except NodesMissing as error:
        print(error, file=sys.stderr)
        control.fail(int(generation), str(error))
        return 1
    except (ValueError, RunFailed) as error:
        print(f"error: {error}", file=sys.stderr)
        control.end(1, str(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
