"""`python -m launch doctor`: checks this machine, or every node of a SLURM job, before a long run."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from launch import run_folder
from launch.doctor.checks import SLURM, checks_of
from launch.doctor.node_job import run_on_nodes
from launch.doctor.outcome import Check, Outcome, Subject
from launch.doctor.process import run_check
from launch.slurm.sbatch import section_of
from pipeline.recipe.file import load_recipe
from pipeline.recipe.schema import Recipe
from pipeline.run.printable import printable_line
from pipeline.run.provenance import load_run_recipe
from pipeline.run.tracking.wandb_mode import settle_mode

EXAMPLE = """\
Check before a long run what it will need. One line per check: pass, warn or fail, and the fix. A few minutes at most,
longer only to read large data files; no check waits for ever.

  %(prog)s                                               this machine: versions, GPUs, Ray, FFCV, memory, limits, wandb
  %(prog)s recipes/fashion_mnist.yaml                    and the recipe's network, data files, weights, disk space
  %(prog)s first                                         the same of a run
  %(prog)s recipes/imagenet_resnet50_linf4.yaml slurm.nodes=2 --on slurm --cluster my_cluster.yaml
                                                         inside a job, on every node

Exit code 0 without a failure, 1 with one, 2 for wrong usage or a recipe that is none.
"""


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "doctor",
        help="check a machine, or the nodes of a SLURM job, before a long run",
        description=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("target", nargs="?", metavar="RECIPE|RUN", help="a recipe's file, or a run")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="recipe keys to override, as for run")
    parser.add_argument(
        "--on", choices=("local", "slurm"), default="local", help="this machine or SLURM (default: %(default)s)"
    )
    parser.add_argument("--cluster", type=Path, metavar="FILE", help="YAML file with a cluster's slurm settings")
    parser.set_defaults(handler=_doctor)


def _doctor(arguments: argparse.Namespace) -> int:
    recipe, subject = _subject(arguments)
    if recipe is not None:
        settle_mode(recipe.tracking.wandb)
    progress = _Progress()
    if arguments.on == "local":
        checks = [*checks_of(subject), SLURM]
        well = [_show(check.name, progress.of(check, subject)) for check in checks]
        return 0 if all(well) else 1
    if recipe is None:
        raise ValueError(
            "doctor --on slurm needs a recipe or a run, whose slurm section, with --cluster FILE, says what a job asks "
            "for; for example: python -m launch doctor recipes/fashion_mnist.yaml --on slurm --cluster FILE"
        )
    section_of(recipe)
    if not _show(SLURM.name, progress.of(SLURM, subject)):
        return 1
    arguments.after_interrupt = "its job is cancelled"

    def show(host: str, line: str) -> None:
        progress.clear()
        print(printable_line(f"{host}  {line}"), flush=True)

    return 0 if run_on_nodes(recipe, subject, show, progress.text) else 1


def _subject(arguments: argparse.Namespace) -> tuple[Recipe | None, Subject]:
    """Errors: ValueError for a recipe or run that cannot be read, or options that do not go together."""
    on_slurm = arguments.on == "slurm"
    if arguments.cluster is not None and not on_slurm:
        raise ValueError(f"--cluster {arguments.cluster} is for --on slurm")
    if arguments.target is None:
        return None, Subject(on_slurm=on_slurm)
    path = Path(arguments.target)
    if path.suffix in (".yaml", ".yml") or path.is_file():
        recipe, run = load_recipe(path, arguments.overrides, arguments.cluster), None
    elif arguments.overrides or arguments.cluster is not None:
        option = arguments.overrides[0] if arguments.overrides else "--cluster"
        raise ValueError(f"{option}: a run is checked with its own recipe; leave it out, or name a recipe's file")
    else:
        run = run_folder.find_run(arguments.target)
        recipe = load_run_recipe(run)
    values = run_folder.with_absolute_paths(recipe).model_dump(mode="json")
    return recipe, Subject(values, None if run is None else str(run.absolute()), on_slurm)


def _show(name: str, outcome: Outcome) -> bool:
    print(printable_line(outcome.line(name)), flush=True)
    return outcome.status != "fail"


class _Progress:
    """What is being checked: on a terminal one line that is replaced, elsewhere a line when it changes."""

    def __init__(self) -> None:
        self._last = ""

    def of(self, check: Check, subject: Subject) -> Outcome:
        """Run a check, with its progress."""
        self.text(f"{check.name} ...")
        try:
            return run_check(check, subject, lambda done, total: self._share(check.name, 100 * done // total))
        finally:
            self.clear()

    def _share(self, name: str, percent: int) -> None:
        if sys.stderr.isatty():
            self.text(f"{name} ... {percent} %")

    def text(self, text: str) -> None:
        if sys.stderr.isatty():
            print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
        elif text != self._last:
            print(text, file=sys.stderr, flush=True)
        self._last = text

    def clear(self) -> None:
        if sys.stderr.isatty():
            print("\r\033[K", end="", file=sys.stderr, flush=True)
