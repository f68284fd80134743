"""Submits the unfinished stages of a run as SLURM jobs, through submitit. Imports no torch, for login nodes.

    pretrain  ->  one array: per sparsity prune + finetune, and each baseline  ->  report

The submitted objects are a few strings (`JobPayload`); everything else a job reads is in the run directory. jobs.json
there maps jobs to stages.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from launch.slurm.node_task import JobPayload
from launch.slurm.report_job import REPORT, Report
from launch.slurm.sbatch import CLIENT_S, FAN, python_of, sbatch_parameters, sbatch_text, section_of
from pipeline.recipe.methods import HYDRA
from pipeline.recipe.schema import Recipe
from pipeline.recipe.stages import DENSE, Stage, stages_of
from pipeline.run.files import atomic_write_json, make_folder, read_json
from pipeline.run.layout import is_done
from pipeline.run.locks import exclusive
from pipeline.run.provenance import load_run_recipe
from pipeline.run.records import Record
from pipeline.run.tracking.wandb_mode import settle_mode

SUBMIT_S = 6 * CLIENT_S
"""How long to wait for another submission of the same run: squeue, and sbatch for three jobs."""
TIMED_OUT = (124, 137)
"""Exit codes of timeout(1)."""
SLURM_SETTINGS = ("SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_CLUSTERS", "SLURM_JWT", "SLURM_SACK_KEY")
"""Variables that SLURM's commands need to find their cluster, and that no allocation sets by itself."""
NO_LIMIT = 10**6
"""submitit bounds timeouts by number; here restarts are bounded by lack of progress."""


@dataclass(frozen=True)
class SubmittedJob:
    """One job of a run."""

    id: str
    job_name: str
    stages: list[str]
    submitted: float

    def row(self) -> dict[str, Any]:
        """The job's entry in jobs.json, where its name is `group`."""
        return {"id": self.id, "group": self.job_name, "stages": self.stages, "submitted": self.submitted}


class _Job(Record):
    id: Annotated[str, Field(pattern=r"^\d+([_+]\d+)?$")]
    """Becomes a part of paths and of commands."""
    group: str
    stages: list[str]
    submitted: float


class _Jobs(Record):
    """jobs.json."""

    jobs: list[_Job]


def stages_by_job(recipe: Recipe) -> dict[str, list[Stage]]:
    """Job name -> its stages; all jobs but the first start from pretrain's result."""
    jobs: dict[str, list[Stage]] = {}
    for stage in stages_of(recipe):
        keep = stage.name.partition("/")[0]
        own = stage.label in (DENSE, HYDRA.label)
        jobs.setdefault(keep if own else f"{keep}-{stage.label}", []).append(stage)
    return jobs


def read_jobs(run_folder: Path) -> list[SubmittedJob]:
    """The jobs of a run, oldest first; empty for a run that was never submitted."""
    path = run_folder / "jobs.json"
    value = read_json(path) if path.exists() else {"jobs": []}
    try:
        return parse_jobs(value)
    except ValueError as error:
        raise ValueError(f"{path} is not a list of jobs ({error}); remove it to start a new one") from None


def parse_jobs(value: Any) -> list[SubmittedJob]:
    """The contents of jobs.json. Errors: ValueError if it is not a list of jobs."""
    return [SubmittedJob(job.id, job.group, job.stages, job.submitted) for job in _Jobs.parse(value).jobs]


def _require(program: str) -> None:
    if shutil.which(program) is None:
        raise ValueError(f"{program} was not found: is this machine in a SLURM cluster? --on local needs none")


def run_client(*command: str) -> str:
    """Output of a SLURM command. Errors: ValueError with its error output."""
    _require(command[0])
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=CLIENT_S)
    except subprocess.TimeoutExpired:
        raise ValueError(f"{' '.join(command)} did not answer in {CLIENT_S} s; run the command again") from None
    if result.returncode:
        raise ValueError(f"{' '.join(command)} failed: {result.stderr.strip()}")
    return result.stdout


def active_jobs(jobs: list[SubmittedJob]) -> list[SubmittedJob]:
    """The jobs that are still queued or running in SLURM."""
    if not jobs:
        return []
    queued = {line.strip() for line in run_client("squeue", "-h", "-r", "-o", "%i", "--me").splitlines()}
    return [job for job in jobs if job.id in queued]


def describe_jobs(recipe: Recipe, run_folder: Path, after: str | None) -> list[str]:
    """The scripts that `submit_run` would pass to sbatch for a new run."""
    first, *rest = stages_by_job(recipe)
    array = len(rest) if len(rest) > 1 else None  # submitit makes no array of one job
    return [
        sbatch_text(recipe, run_folder, first, after=f"afterany:{after}" if after else None),
        sbatch_text(recipe, run_folder, FAN, array=array, after=f"afterok:JOB_OF_{first}"),
        sbatch_text(recipe, run_folder, REPORT, after=f"afterany:JOB_OF_{first}:JOBS_OF_{FAN}"),
    ]


def submit_work(recipe: Recipe, run_folder: Path, name: str, work: list[Any], dependency: str | None) -> list[str]:
    """One job, or an array of several; returns their ids. Errors: ValueError with SLURM's reason if it refuses them."""
    import submitit
    from submitit.core.utils import FailedJobError

    _require("srun")  # submitit requires it
    # On the class: submitit creates another executor to submit an array.
    submitit.SlurmExecutor._make_submission_command = _sbatch
    # Other users stay out: sbatch files hold `slurm.setup`, which may export keys, and logs what it prints.
    make_folder(run_folder / "jobs", 0o700)
    (run_folder / "jobs").chmod(0o700)
    jobs_folder = (run_folder / "jobs").resolve()
    executor = submitit.SlurmExecutor(jobs_folder, max_num_timeout=NO_LIMIT, python=python_of(recipe))
    executor.update_parameters(**sbatch_parameters(recipe, run_folder, name, dependency))
    try:
        with _own_environment(), executor.batch():
            jobs = [executor.submit(one) for one in work]
    except FailedJobError as error:
        if isinstance(cause := error.__cause__, subprocess.CalledProcessError) and cause.returncode in TIMED_OUT:
            raise ValueError(
                f"sbatch did not answer in {CLIENT_S} s; if squeue shows a job {run_folder.name}-{name} anyway, "
                "scancel it; then run the command again"
            ) from None
        raise ValueError(
            f"SLURM refused the job: {str(error).strip().splitlines()[-1]}; fix the recipe's slurm.* keys"
        ) from None
    return [job.job_id for job in jobs]


@contextmanager
def _own_environment() -> Iterator[None]:
    """Without what an allocation says about itself, which sbatch passes on, and which srun refuses beside ours.

    What users and sites tell SLURM's commands stays.
    """
    import submitit

    settings = {name: os.environ[name] for name in os.environ if name in SLURM_SETTINGS or name.startswith("SBATCH_")}
    with submitit.helpers.clean_env():
        os.environ.update(settings)
        yield


def _sbatch(self: Any, submission_file_path: Path) -> list[str]:
    """Replaces a method of submitit's executors that calls sbatch without a deadline."""
    return ["timeout", "--foreground", "--kill-after=5", str(CLIENT_S), "sbatch", str(submission_file_path)]


def submit_run(run_folder: Path, after: str | None = None, observer: str | None = None) -> list[SubmittedJob]:
    """Submit the unfinished stages of a run that have no active job. `after`: id of a job that must end first.

    Errors: ValueError with SLURM's reason if it refuses a job.
    """
    with ExitStack() as stack:
        try:
            stack.enter_context(exclusive(run_folder / ".jobs.lock", SUBMIT_S))  # two at once would submit twice
        except TimeoutError:
            raise ValueError(
                f"{run_folder} has been submitted by another process for {SUBMIT_S} s; end that, or wait for it"
            ) from None
        return _submit_unfinished(run_folder, after, observer)


def _submit_unfinished(run_folder: Path, after: str | None, observer: str | None) -> list[SubmittedJob]:
    recipe = load_run_recipe(run_folder)
    settle_mode(recipe.tracking.wandb)
    section_of(recipe)
    submitted = read_jobs(run_folder)
    active = {job.job_name: job for job in active_jobs(submitted)}
    unfinished = {
        job_name: [stage.name for stage in stages if not is_done(run_folder, stage)]
        for job_name, stages in stages_by_job(recipe).items()
    }
    folder = str(run_folder.resolve())
    new: list[SubmittedJob] = []

    def add(names: list[str], title: str, work: list[Any], dependency: str | None) -> None:
        ids = submit_work(recipe, run_folder, title, work, dependency)
        for number, (job_name, job) in enumerate(zip(names, ids, strict=True)):
            new.append(SubmittedJob(job, job_name, work[number].stages, time.time()))
        atomic_write_json(run_folder / "jobs.json", {"jobs": [job.row() for job in [*submitted, *new]]})

    first, *rest = unfinished
    if unfinished[first] and first not in active:
        payload = JobPayload(folder, first, unfinished[first], observer)
        add([first], first, [payload], f"afterany:{after}" if after else None)
    pretrain = next((job.id for job in [*new, *active.values()] if job.job_name == first), None)
    fan = [job_name for job_name in rest if unfinished[job_name] and job_name not in active]
    if fan:
        dependency = f"afterok:{pretrain}" if pretrain else f"afterany:{after}" if after else None
        add(fan, FAN, [JobPayload(folder, job_name, unfinished[job_name], observer) for job_name in fan], dependency)
    if REPORT not in active and (new or not any(unfinished.values())):
        ids = [job.id for job in [*new, *active.values()]]
        add([REPORT], REPORT, [Report(folder, [])], f"afterany:{':'.join(ids)}" if ids else None)
    return new


def cancel_jobs(run_folder: Path) -> list[SubmittedJob]:
    """Cancel all active jobs of a run, and return them; its checkpoints stay."""
    jobs = active_jobs(read_jobs(run_folder))
    if jobs:
        run_client("scancel", *[job.id for job in jobs])
    return jobs
