"""`python -m launch run`, `resume` and `cancel`: start a recipe here or on SLURM, resume it, cancel its jobs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from launch import run_folder
from launch.local import run_here
from launch.slurm import submit
from launch.slurm.nodes import unused_workers
from launch.slurm.sbatch import section_of
from pipeline.recipe.file import dump_recipe, load_recipe
from pipeline.recipe.schema import Recipe
from pipeline.recipe.stages import stages_of
from pipeline.run.provenance import load_run_recipe

RESUMABLE = "checkpoints are kept; continue with: python -m launch resume RUN"


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
        help="print the resolved recipe, its stages and (with --on slurm) its sbatch files; start nothing",
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
    run.set_defaults(handler=_run, after_interrupt=RESUMABLE)

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
    resume.set_defaults(handler=_resume, after_interrupt=RESUMABLE)

    cancel = subparsers.add_parser("cancel", help="cancel a run's SLURM jobs; its checkpoints are kept")
    cancel.add_argument("run", metavar="RUN", help="name of a run under runs/, or its folder")
    cancel.set_defaults(handler=_cancel)


def _refuse_after_without_slurm(arguments: argparse.Namespace, on: str) -> None:
    if arguments.after is not None and on != "slurm":
        raise ValueError(f"--after {arguments.after} is a SLURM job, and this run is not on SLURM: add --on slurm")


def _run(arguments: argparse.Namespace) -> int:
    _refuse_after_without_slurm(arguments, arguments.on)
    recipe = load_recipe(arguments.recipe, arguments.overrides, arguments.cluster)
    if arguments.dry_run:
        _print_plan(recipe, arguments)
        return 0
    folder = run_folder.open_or_create(recipe, arguments.name, run_folder.check_data(recipe))
    return _submit(folder, arguments.after) if arguments.on == "slurm" else run_here(folder)


def _print_plan(recipe: Recipe, arguments: argparse.Namespace) -> None:
    print(dump_recipe(recipe), end="")
    print("# stages, in order:")
    for stage in stages_of(recipe):
        o = stage.optimisation
        start = f"from {stage.starts_from}" if stage.starts_from else "from scratch"
        print(f"#   {stage.name:<22} {o.epochs:>3} epochs  lr {o.lr:<7g} trains {stage.trains}, {start}")
    if arguments.on == "slurm":
        if (note := unused_workers(recipe, section_of(recipe).nodes[1])) is not None:
            print(f"# {note}")
        folder = run_folder.RUNS / (arguments.name or recipe.name)
        for text in submit.describe_jobs(recipe, folder, arguments.after):
            print(text)


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
    on = arguments.on or ("slurm" if submit.read_jobs(folder) else "local")
    if on == "slurm":
        run_folder.check_same_data(folder)
        return _submit(folder, arguments.after)
    _refuse_after_without_slurm(arguments, on)
    return run_here(folder)


def _cancel(arguments: argparse.Namespace) -> int:
    folder = run_folder.find_run(arguments.run)
    jobs = submit.cancel_jobs(folder)
    print(f"{folder}: {', '.join(f'job {job.id} ({job.job_name})' for job in jobs) or 'no job'} cancelled; {RESUMABLE}")
    return 0
