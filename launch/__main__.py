"""The command line: `python -m launch --help`.

Exit codes: 0 done, 1 failed, 2 wrong usage, recipe or data. Those of the second kind are messages without traceback.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from pathlib import Path
from types import FrameType

from launch import run_folder
from launch.commands import data, evaluate, leaderboard, logs, status
from launch.local import run_here
from launch.slurm import submit
from launch.slurm.nodes import unused_workers
from launch.slurm.sbatch import section_of
from pipeline.recipe.file import dump_recipe, load_recipe
from pipeline.recipe.schema import Recipe
from pipeline.recipe.stages import stages_of

DESCRIPTION = """\
Small neural networks that withstand adversarial examples: pretrain robustly, prune by scores that the robust objective
learns (HYDRA), finetune, evaluate, report.

  python -m launch data write fashion_mnist --out data/fashion_mnist
  python -m launch run recipes/fashion_mnist.yaml phases.pretrain.epochs=2 --name quick
  python -m launch resume quick
  python -m launch report quick

  python -m launch run recipes/imagenet_resnet50_linf4.yaml --on slurm --cluster my_cluster.yaml slurm.nodes=1-4
"""

log = logging.getLogger(__name__)

RESUMABLE = "checkpoints are kept: python -m launch resume RUN goes on"


def _refuse_after_without_slurm(arguments: argparse.Namespace, on: str) -> None:
    if arguments.after is not None and on != "slurm":
        raise ValueError(f"--after {arguments.after} is a SLURM job, and this run is not for SLURM: add --on slurm")


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
    recipe = load_recipe(folder / "recipe.yaml")
    if (note := unused_workers(recipe, section_of(recipe).nodes[1])) is not None:
        print(note)
    for job in submit.submit_run(folder, after):
        print(f"job {job.id:<10} {job.group}: {', '.join(job.stages) or 'table and pictures'}")
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
    print(f"{folder}: {', '.join(f'job {job.id} ({job.group})' for job in jobs) or 'no job'} cancelled; {RESUMABLE}")
    return 0


def _report(arguments: argparse.Namespace) -> int:
    from pipeline.report.build import PAGE, build_report  # matplotlib is loaded only here
    from pipeline.report.wandb_report import log_report

    folders = [run_folder.find_run(name) for name in arguments.runs]
    try:
        text = build_report(folders)
    except OSError as error:
        raise ValueError(f"the report cannot be written: {error}; of several runs, name a run of yours first") from None
    print(text)
    print(f"pictures and CSV: {folders[0] / 'report'}/")
    print(f"page: {folders[0] / 'report' / PAGE}")
    for folder in folders:
        try:
            log_report(folder, alone=len(folders) == 1)
        except OSError as error:
            log.warning("the report of %s is not in wandb: %s", folder, error)
    return 0


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m launch", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.set_defaults(after_interrupt="nothing was changed")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    run = commands.add_parser("run", help="start a recipe, or go on with it; a finished run is left as it is")
    run.add_argument("recipe", type=Path, help="YAML file, for example recipes/fashion_mnist.yaml")
    run.add_argument("overrides", nargs="*", metavar="key=value", help="for example phases.prune.epochs=3 seed=1")
    run.add_argument("--name", help="folder under runs/ (default: the recipe's name)")
    run.add_argument("--dry-run", action="store_true", help="print the resolved recipe and its stages, run nothing")
    run.add_argument("--on", choices=("local", "slurm"), default="local", help="where (default: %(default)s)")
    run.add_argument("--cluster", type=Path, metavar="FILE", help="YAML with what all jobs of a cluster share")
    run.add_argument("--after", metavar="JOB", help="a SLURM job that must have ended before")
    run.set_defaults(handler=_run, after_interrupt=RESUMABLE)

    resume = commands.add_parser("resume", help="go on with a run from its newest checkpoint")
    resume.add_argument("run", metavar="RUN", help="name under runs/, or the folder")
    resume.add_argument("--on", choices=("local", "slurm"), help="where (default: where it was started)")
    resume.add_argument("--after", metavar="JOB", help="a SLURM job that must have ended before")
    resume.set_defaults(handler=_resume, after_interrupt=RESUMABLE)

    cancel = commands.add_parser("cancel", help="end a run's SLURM jobs; its checkpoints stay")
    cancel.add_argument("run", metavar="RUN", help="name under runs/, or the folder")
    cancel.set_defaults(handler=_cancel)

    report = commands.add_parser("report", help="table, HTML page, pictures and CSV of one or several runs (seeds)")
    report.add_argument("runs", nargs="+", metavar="RUN", help="name under runs/, or the folder")
    report.set_defaults(handler=_report)

    evaluate.add_parser(commands)
    leaderboard.add_parser(commands)
    data.add_parser(commands)
    status.add_parser(commands)
    logs.add_parser(commands)
    return parser


def _terminated(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = build_parser()
    arguments, rest = parser.parse_known_args(argv)
    # argparse leaves overrides behind that follow an option, as in `run RECIPE --name quick seed=1`.
    odd = [text for text in rest if text.startswith("-") or "overrides" not in arguments]
    if odd:
        parser.error(f"unrecognized arguments: {' '.join(odd)}")
    if rest:
        arguments.overrides += rest
    return arguments


def main(argv: list[str] | None = None) -> int:
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    arguments = _parse(argv)
    signal.signal(signal.SIGTERM, _terminated)
    try:
        return arguments.handler(arguments)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader left; nothing more to say to it
        return 1
    except KeyboardInterrupt:
        print(f"interrupted; {arguments.after_interrupt}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
