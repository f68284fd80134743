"""The driver inside a SLURM job: joins the Ray cluster of the job's nodes and runs the job's stages.

Started by `launch.slurm.node_task`. Exit code 0 means done, 75 stopped on request. After any other exit, an unforeseen
exception included, the leader tries again, unless ended.json exists.
"""

from __future__ import annotations

import argparse
import sys
from contextlib import AbstractContextManager
from pathlib import Path

from launch.exit_codes import print_error
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
"""A requeued job may start on another node before the lease of its previous start has expired."""


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m launch.slurm.driver_main")
    parser.add_argument("run_folder", type=Path)
    parser.add_argument("--stages", required=True, metavar="STAGE[,STAGE]")
    parser.add_argument("--control", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--generation", type=int, required=True)
    parser.add_argument("--hosts", required=True, metavar="HOST[,HOST]")
    parser.add_argument("--observer", metavar="MODULE:FUNCTION")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run the stages; returns the exit code."""
    options = _parse(arguments)
    control, names = ControlFiles(options.control), options.hosts.split(",")
    request = RunRequest(
        options.run_folder,
        tuple(options.stages.split(",")),
        control.stop,
        observer=options.observer,
        lease_patience_s=LEASE_PATIENCE_S,
    )

    def connect(recipe: Recipe) -> AbstractContextManager[Cluster]:
        if (note := unused_workers(recipe, len(names))) is not None:
            print(note, file=sys.stderr)
        return joined_cluster(recipe, control, options.generation, names)

    try:
        run_and_show(request, connect)
    except StopRequested as stop:
        print(stop, file=sys.stderr)
        return STOPPED
    except NodesMissing as error:
        print(error, file=sys.stderr)
        control.record_failure(options.generation, str(error))
        return 1
    except (ValueError, RunFailed) as error:
        print_error(error)
        control.end(1, str(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
