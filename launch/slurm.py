"""Runs on SLURM: what is left of a run becomes jobs, submitted through submitit. Needs no torch: a login node does it.

    pretrain  ->  one array: per sparsity prune + finetune, and each baseline  ->  report

The submitted objects are a few strings (`allocation.Share`); everything else a job reads is in the run directory.
jobs.json there says which job does what.
"""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from launch.allocation import Report, Share
from launch.ray_settings import ROOT
from pipeline.committed import is_done
from pipeline.files import atomic_write_json, exclusive, read_json
from pipeline.phases import Stage, stages_of
from pipeline.recipe import Recipe
from pipeline.recipe_file import load_recipe
from pipeline.recipe_slurm import Slurm

CLIENT_S = 60
"""How long a SLURM command may take."""
REPORT = "report"
"""The group of the last job, which needs one node and no GPU."""
NO_LIMIT = 10**6
"""submitit counts timeouts; what bounds restarts here is lack of progress."""


@dataclass(frozen=True)
class Submitted:
    """One job of a run."""

    id: str
    group: str
    stages: list[str]
    submitted: float


def groups_of(recipe: Recipe) -> dict[str, list[Stage]]:
    """Which stages one job does; all groups but the first start from pretrain's result."""
    groups: dict[str, list[Stage]] = {}
    for stage in stages_of(recipe):
        keep = stage.name.partition("/")[0]
        groups.setdefault(f"{keep}-{stage.phase}" if stage.is_baseline else keep, []).append(stage)
    return groups


def read_jobs(run_folder: Path) -> list[Submitted]:
    """The jobs of a run, oldest first; empty for a run of this machine."""
    path = run_folder / "jobs.json"
    try:
        return parse_jobs(read_json(path)) if path.exists() else []
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is no list of jobs ({error}); remove it to begin a new one") from None


def parse_jobs(value: Any) -> list[Submitted]:
    """What jobs.json holds. Errors: KeyError or TypeError if it is no list of jobs."""
    return [Submitted(**job) for job in value["jobs"]]


def _require(program: str) -> None:
    if shutil.which(program) is None:
        raise ValueError(f"{program} was not found: is this a machine of a SLURM cluster? --on local needs none")


def _client(*command: str) -> str:
    """Output of a SLURM command. Errors: ValueError with what it said."""
    _require(command[0])
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=CLIENT_S)
    except subprocess.TimeoutExpired:
        raise ValueError(f"{' '.join(command)} did not answer in {CLIENT_S} s; give the command again") from None
    if done.returncode:
        raise ValueError(f"{' '.join(command)} failed: {done.stderr.strip()}")
    return done.stdout


def living(jobs: list[Submitted]) -> list[Submitted]:
    """Those that SLURM still has queued or running."""
    if not jobs:
        return []
    queued = {line.strip() for line in _client("squeue", "-h", "-r", "-o", "%i", "--me").splitlines()}
    return [job for job in jobs if job.id in queued]


def sbatch_parameters(recipe: Recipe, run_folder: Path, group: str, dependency: str | None) -> dict[str, Any]:
    """What submitit's SlurmExecutor is told; its names are sbatch's."""
    slurm = _section(recipe)
    low, high = slurm.nodes
    extra: dict[str, Any] = {
        "nodes": str(low) if low == high else f"{low}-{high}",
        "requeue": True,
        "chdir": str(ROOT),
        **slurm.options,
    }
    if slurm.mem is not None:
        extra["mem"] = slurm.mem
    if dependency is not None:
        extra |= {"dependency": dependency, "kill-on-invalid-dep": "yes"}
    named = ["partition", "account", "qos", "constraint", "exclude", "mail_user", "mail_type"]
    if group == REPORT:
        extra["nodes"] = "1"
    else:
        named += ["gpus_per_node", "gres"]
    return {
        "job_name": f"{run_folder.name}-{group}",
        "time": slurm.time,
        "ntasks_per_node": 1,
        "cpus_per_task": slurm.cpus_per_task,
        "signal_delay_s": slurm.signal_s,
        "array_parallelism": slurm.parallel_jobs,
        "setup": list(slurm.setup),
        "teardown": _teardown(run_folder),
        "srun_args": _srun_arguments(slurm),
        "additional_parameters": extra,
        **{name: value for name in named if (value := getattr(slurm, name)) is not None},
    }


def _section(recipe: Recipe) -> Slurm:
    if recipe.slurm is None:
        raise ValueError(
            "--on slurm needs a slurm: section in the recipe, a profile (--cluster FILE), or at least one "
            "slurm.key=value, for example slurm.time=12:00:00"
        )
    return recipe.slurm


def _srun_arguments(slurm: Slurm) -> list[str]:
    # srun does not take over --cpus-per-task since SLURM 22.05; one dead task ends the others.
    arguments = [f"--cpus-per-task={slurm.cpus_per_task}", "--kill-on-bad-exit=1"]
    if slurm.container_image is not None:
        arguments.append(f"--container-image={slurm.container_image}")
        arguments += [f"--container-mounts={slurm.container_mounts}"] if slurm.container_mounts is not None else []
    return arguments


def _teardown(run_folder: Path) -> list[str]:
    """Shell lines after srun: queue again what began and did not end by itself, unless SLURM has taken the job away.

    A start that was not even counted (no Python, no project on the node, no room in the run directory) is not queued
    again: nothing would bound that. One task of an array has the array's own job id, which stands for all of them, so
    an array's tasks are named by their numbers.
    """
    return [
        "code=$?",
        f'start={shlex.quote(str(run_folder.resolve()))}/control/"$SLURM_JOB_ID-${{SLURM_RESTART_COUNT:-0}}"',
        "me=$SLURM_JOB_ID",
        'if [ -n "$SLURM_ARRAY_JOB_ID" ]; then me=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID; fi',
        'if [ "$code" -ne 0 ] && [ -e "$start/counted" ] && [ ! -e "$start/ended.json" ] &&',
        '  [ "$(squeue -h -r -j "$me" -o %T)" = RUNNING ]; then',
        '  scontrol requeue "$me"',
        "fi",
        'exit "$code"',
    ]


def _python(recipe: Recipe) -> str:
    """The interpreter on the nodes: this one, or the container's own."""
    return "python3" if _section(recipe).container_image else shlex.quote(sys.executable)


def sbatch_text(
    recipe: Recipe, run_folder: Path, group: str, *, array: int | None = None, after: str | None = None
) -> str:
    """The file that sbatch would be given. Works where there is no SLURM."""
    from submitit.slurm.slurm import _make_sbatch_string

    jobs = (run_folder / "jobs").resolve()
    return _make_sbatch_string(
        command=f"{_python(recipe)} -u -m submitit.core._submit {shlex.quote(str(jobs))}",
        folder=jobs,
        map_count=array,
        **sbatch_parameters(recipe, run_folder, group, after),
    )


def plan(recipe: Recipe, run_folder: Path, after: str | None) -> list[str]:
    """The files that `submit` would give to sbatch for a new run."""
    first, *rest = groups_of(recipe)
    texts = [sbatch_text(recipe, run_folder, first, after=f"afterany:{after}" if after else None)]
    texts.append(sbatch_text(recipe, run_folder, "sparsities", array=len(rest), after="afterok:<pretrain>"))
    texts.append(sbatch_text(recipe, run_folder, REPORT, after="afterany:<pretrain>:<sparsities>"))
    return texts


def _submit(recipe: Recipe, run_folder: Path, name: str, work: list[Any], dependency: str | None) -> list[str]:
    """One job, or an array of several; returns their ids."""
    import submitit
    from submitit.core.utils import FailedJobError

    _require("srun")  # what submitit looks for
    executor = submitit.SlurmExecutor(run_folder / "jobs", max_num_timeout=NO_LIMIT, python=_python(recipe))
    executor.update_parameters(**sbatch_parameters(recipe, run_folder, name, dependency))
    try:
        with executor.batch():
            jobs = [executor.submit(one) for one in work]
    except FailedJobError as error:
        raise ValueError(
            f"SLURM refused the job: {str(error).strip().splitlines()[-1]}; mend slurm.* of the recipe"
        ) from None
    return [job.job_id for job in jobs]


def submit(run_folder: Path, after: str | None = None, observer: str | None = None) -> list[Submitted]:
    """Submit what is left of a run and has no living job. `after`: a job that must have ended before.

    Errors: ValueError for what SLURM refuses, naming what it says.
    """
    with exclusive(run_folder / ".jobs.lock"):  # two at once would submit everything twice
        return _submit_what_is_left(run_folder, after, observer)


def _submit_what_is_left(run_folder: Path, after: str | None, observer: str | None) -> list[Submitted]:
    recipe = load_recipe(run_folder / "recipe.yaml")
    _section(recipe).workers_of_a_node(recipe.workers.threads)
    known = read_jobs(run_folder)
    alive = {job.group: job for job in living(known)}
    left = {
        group: [stage.name for stage in stages if not is_done(run_folder, stage)]
        for group, stages in groups_of(recipe).items()
    }
    folder = str(run_folder.resolve())
    new: list[Submitted] = []

    def add(groups: list[str], name: str, work: list[Any], dependency: str | None) -> None:
        ids = _submit(recipe, run_folder, name, work, dependency)
        for number, (group, job) in enumerate(zip(groups, ids, strict=True)):
            new.append(Submitted(job, group, work[number].stages, time.time()))
        atomic_write_json(run_folder / "jobs.json", {"jobs": [asdict(job) for job in [*known, *new]]})

    first, *rest = left
    if left[first] and first not in alive:
        add([first], first, [Share(folder, first, left[first], observer)], f"afterany:{after}" if after else None)
    before = next((job.id for job in [*new, *alive.values()] if job.group == first), None)
    fan = [group for group in rest if left[group] and group not in alive]
    if fan:
        dependency = f"afterok:{before}" if before else f"afterany:{after}" if after else None
        add(fan, "sparsities", [Share(folder, group, left[group], observer) for group in fan], dependency)
    if REPORT not in alive and (new or not any(left.values())):
        ids = [job.id for job in [*new, *alive.values()]]
        add([REPORT], REPORT, [Report(folder, [])], f"afterany:{':'.join(ids)}" if ids else None)
    return new


def cancel(run_folder: Path) -> list[Submitted]:
    """End all jobs of a run; its checkpoints stay. Returns those that lived."""
    jobs = living(read_jobs(run_folder))
    if jobs:
        _client("scancel", *[job.id for job in jobs])
    return jobs
