"""Builds the sbatch scripts from a recipe's slurm section, through submitit. Works without SLURM."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

from launch.slurm.report_job import REPORT
from pipeline.recipe.schema import Recipe
from pipeline.recipe.slurm import Slurm

CLIENT_S = 60
"""Deadline of a SLURM command."""
FAN = "sparsities"
"""Name of the array of all jobs between pretrain and the report."""


def sbatch_parameters(recipe: Recipe, run_folder: Path, job_name: str, dependency: str | None) -> dict[str, Any]:
    """Parameters for submitit's SlurmExecutor, which have sbatch's names.

    Errors: ValueError for a run directory whose path cannot stand in an sbatch file.
    """
    slurm = section_of(recipe)
    if not str(run_folder.resolve()).isprintable():
        raise ValueError(f"{str(run_folder.resolve())!r} has a line break or another control character; rename it")
    low, high = slurm.nodes
    extra: dict[str, Any] = {
        "nodes": str(low) if low == high else f"{low}-{high}",
        "requeue": True,
        **slurm.options,
    }
    if slurm.mem is not None:
        extra["mem"] = slurm.mem
    if dependency is not None:
        extra |= {"dependency": dependency, "kill-on-invalid-dep": "yes"}
    keys = ["partition", "account", "qos", "constraint", "exclude", "mail_user", "mail_type"]
    if job_name == REPORT:
        extra["nodes"] = "1"
    else:
        keys += ["gpus_per_node", "gres"]
    return {
        "job_name": f"{run_folder.name}-{job_name}",
        "time": slurm.time,
        "cpus_per_task": slurm.cpus_per_task,
        "signal_delay_s": slurm.signal_s,
        "array_parallelism": slurm.parallel_jobs,
        "setup": list(slurm.setup),
        "teardown": _teardown(run_folder),
        "srun_args": _srun_arguments(slurm),
        "additional_parameters": extra,
        **{name: value for name in keys if (value := getattr(slurm, name)) is not None},
    }


def section_of(recipe: Recipe) -> Slurm:
    """The slurm section. Errors: ValueError if there is none, or if its nodes have no room for the workers."""
    if recipe.slurm is None:
        raise ValueError(
            "--on slurm needs a slurm: section in the recipe, a profile (--cluster FILE), or at least one "
            "slurm.key=value, for example slurm.time=12:00:00"
        )
    recipe.slurm.check_room(recipe.workers.device, recipe.workers.threads)
    return recipe.slurm


def _srun_arguments(slurm: Slurm) -> list[str]:
    # --ntasks-per-node is for srun only: with it, sbatch counts one task per node of the lower end of a range, and
    # never allocates more nodes than tasks. srun does not inherit --cpus-per-task since SLURM 22.05. One dead task
    # ends the others.
    arguments = ["--ntasks-per-node=1", f"--cpus-per-task={slurm.cpus_per_task}", "--kill-on-bad-exit=1"]
    # Sites set SBATCH_EXPORT=NONE, which SLURM passes on to srun: the task would have none of what setup exports.
    arguments.append("--export=ALL")
    if slurm.container_image is not None:
        arguments.append(f"--container-image={slurm.container_image}")
        arguments += [f"--container-mounts={slurm.container_mounts}"] if slurm.container_mounts is not None else []
    return arguments


def _teardown(run_folder: Path) -> list[str]:
    """Shell lines after srun: requeue a job that started and was not ended for good, unless SLURM itself ended it.

    A start that was not counted (no Python, no project on the node, no room in the run directory) is not requeued:
    nothing would bound that. One array task has the array's own job id, which stands for all of them, so array tasks
    are named by their numbers.
    """
    folder = run_folder.resolve()
    no_answer = f"SLURM did not requeue this job; continue with: python -m launch resume {folder}"
    return [
        "code=$?",
        f'start={shlex.quote(str(folder))}/control/"$SLURM_JOB_ID-${{SLURM_RESTART_COUNT:-0}}"',
        "me=$SLURM_JOB_ID",
        'if [ -n "$SLURM_ARRAY_JOB_ID" ]; then me=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID; fi',
        'if [ "$code" -ne 0 ] && [ -e "$start/counted" ] && [ ! -e "$start/ended.json" ]; then',
        f'  if state=$(timeout {CLIENT_S} squeue -h -r -j "$me" -o %T); then',
        f'    [ "$state" != RUNNING ] || timeout {CLIENT_S} scontrol requeue "$me" && exit "$code"',
        "  fi",
        f"  echo {shlex.quote(no_answer)} >&2",
        "fi",
        'exit "$code"',
    ]


def python_of(recipe: Recipe) -> str:
    """The interpreter on the nodes: this one, or the container's own.

    Ignores SLURM's warning (USR2) until submitit handles it: while Python starts, the signal would end the task.
    """
    python = "python3" if section_of(recipe).container_image else shlex.quote(sys.executable)
    return f"""sh -c 'trap "" USR2; exec "$0" "$@"' {python}"""


def sbatch_text(
    recipe: Recipe, run_folder: Path, job_name: str, *, array: int | None = None, after: str | None = None
) -> str:
    """The script that would be passed to sbatch."""
    from submitit.slurm.slurm import _make_sbatch_string

    jobs = (run_folder / "jobs").resolve()
    return _make_sbatch_string(
        command=f"{python_of(recipe)} -u -m submitit.core._submit {shlex.quote(str(jobs))}",
        folder=jobs,
        map_count=array,
        **sbatch_parameters(recipe, run_folder, job_name, after),
    )
