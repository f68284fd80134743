"""`python -m launch run`, `resume` and `cancel`: start a recipe here or on SLURM, resume it, cancel its jobs."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

from launch import run_folder
from launch.commands.dry_run import plan_lines
from launch.local import run_here
from launch.slurm import submit
from launch.slurm.nodes import unused_workers
from launch.slurm.sbatch import section_of
from pipeline.recipe.file import dump_recipe, load_recipe
from pipeline.recipe.schema import Recipe
from pipeline.run.provenance import load_run_recipe

JOB = re.compile(r"\d+([_+]\d+)?")
"""A SLURM job's id; _ and + number the tasks of arrays and the parts of heterogeneous jobs."""
RESUMABLE = "checkpoints are kept; continue with: python -m launch resume {}"


def add_parser(subparsers: Any) -> None:
    run = subparsers.add_parser(
        "run",
        help="train, prune, finetune and evaluate as a recipe says; resumes a run of the same recipe",
        description="Start or resume the run of a recipe in runs/NAME. A finished run is left unchanged.",
    )
    run.add_argument("recipe", type=Path, help="YAML file, for example recipes/fashion_mnist.yaml")
    run.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="recipe keys to override, for example phases.prune.epochs=3 seed=1",
    )
    run.add_argument("--name", help="name of the run, its folder under runs/ (default: the recipe's name)")
    run.add_argument(
        "--dry-run",
        action="store_true",
        help="check recipe, data and weights; print stages, steps, disk, time if it was measured, the resolved "
        "recipe and (with --on slurm) sbatch files; start nothing",
    )
    run.add_argument(
        "--on", choices=("local", "slurm"), default="local", help="this machine or SLURM (default: %(default)s)"
    )
    run.add_argument(
        "--cluster",
        type=Path,
        metavar="FILE",
        help="YAML file with a cluster's slurm settings, such as partition and account; the recipe's keys win",
    )
    run.add_argument("--after", metavar="JOB", help="id of a SLURM job that must end first")
    run.set_defaults(handler=_run)

    resume = subparsers.add_parser(
        "resume",
        help="continue a run from its newest checkpoint",
        description="Continue a run from its newest checkpoint; on SLURM, submit what is unfinished and has no job.",
    )
    resume.add_argument("run", metavar="RUN", help="name of a run under runs/, or its folder")
    resume.add_argument(
        "--on", choices=("local", "slurm"), help="this machine or SLURM (default: where it was started)"
    )
    resume.add_argument("--after", metavar="JOB", help="id of a SLURM job that must end first")
    resume.set_defaults(handler=_resume)

    cancel = subparsers.add_parser("cancel", help="cancel a run's SLURM jobs; its checkpoints are kept")
    cancel.add_argument("run", metavar="RUN", help="name of a run under runs/, or its folder")
    cancel.set_defaults(handler=_cancel)


def _check_after(after: str | None, on: str) -> None:
    """Errors: ValueError if --after is no job's id, or if the run is not on SLURM."""
    if after is None:
        return
    if not JOB.fullmatch(after):
        raise ValueError(f"--after {after!r}: expected the id of a SLURM job, for example 4242 or 4242_1")
    if on != "slurm":
        raise ValueError(f"--after {after} is a SLURM job, and this run is not on SLURM: add --on slurm")


def _run(arguments: argparse.Namespace) -> int:
    _check_after(arguments.after, arguments.on)
    run_folder.check_name(arguments.name)
    recipe = load_recipe(arguments.recipe, arguments.overrides, arguments.cluster)
    if arguments.dry_run:
        return _print_plan(recipe, arguments)
    if arguments.on == "slurm":
        section_of(recipe)
    data_sha256 = run_folder.check_data(recipe)
    _refuse_jobs_of_another_recipe(run_folder.check_start(recipe, arguments.name), recipe, data_sha256)
    folder = run_folder.open_or_create(recipe, arguments.name, data_sha256)
    arguments.after_interrupt = RESUMABLE.format(folder)
    return _submit(folder, arguments.after) if arguments.on == "slurm" else run_here(folder)


def _refuse_jobs_of_another_recipe(folder: Path, recipe: Recipe, data_sha256: dict[str, str]) -> None:
    if run_folder.begins_anew(folder, recipe, data_sha256) and (jobs := submit.active_jobs(submit.read_jobs(folder))):
        ids = ", ".join(job.id for job in jobs)
        raise ValueError(
            f"{folder} has jobs in SLURM that were submitted with another recipe or other data ({ids}); cancel them: "
            f"python -m launch cancel {folder}"
        )


def _print_plan(recipe: Recipe, arguments: argparse.Namespace) -> int:
    """The plan as comments before the resolved recipe, so that what is printed is a recipe.

    Errors: ValueError, after printing, for what would stop the run.
    """
    lines, problems = plan_lines(recipe, arguments.name, with_torch=arguments.on == "local")
    if arguments.on == "slurm" and (note := unused_workers(recipe, section_of(recipe).nodes[1])) is not None:
        lines.append(note)
    print("\n".join(f"# {line}" for line in lines))
    print(dump_recipe(recipe), end="")
    if arguments.on == "slurm":
        folder = run_folder.RUNS / (arguments.name or recipe.name)
        for text in submit.describe_jobs(recipe, folder, arguments.after):
            print(text)
    if problems:
        raise ValueError("\n".join(["this would not start:", *problems]) if len(problems) > 1 else problems[0])
    return 0


def _submit(folder: Path, after: str | None) -> int:
    recipe = load_run_recipe(folder)
    if (note := unused_workers(recipe, section_of(recipe).nodes[1])) is not None:
        print(note)
    for job in submit.submit_run(folder, after):
        print(f"job {job.id:<10} {job.job_name}: {', '.join(job.stages) or 'table and charts'}")
    print(f"follow it with: python -m launch status {folder.name}    python -m launch logs {folder.name} -f")
    return 0


def _resume(arguments: argparse.Namespace) -> int:
    folder = run_folder.find_run(arguments.run)
    arguments.after_interrupt = RESUMABLE.format(folder)
    on = arguments.on or ("slurm" if submit.read_jobs(folder) else "local")
    _check_after(arguments.after, on)
    if on == "slurm":
        run_folder.check_same_data(folder)
        return _submit(folder, arguments.after)
    return run_here(folder)


def _cancel(arguments: argparse.Namespace) -> int:
    folder = run_folder.find_run(arguments.run)
    jobs = submit.cancel_jobs(folder)
    cancelled = ", ".join(f"job {job.id} ({job.job_name})" for job in jobs) or "no job"
    print(f"{folder}: {cancelled} cancelled; {RESUMABLE.format(folder)}")
    return 0
