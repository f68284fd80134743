"""The command line: `hydra-pipeline --help`, or `python -m launch --help`.

`runs/` and relative paths are relative to the working folder.
Exit codes: 0 done, 1 failed, 2 wrong usage, recipe or data (a message without a traceback).
"""

from __future__ import annotations

import argparse
import importlib.machinery
import io
import os
import signal
import sys
from pathlib import Path

from launch.commands import (
    benchmark,
    data,
    doctor,
    evaluate,
    export,
    leaderboard,
    logs,
    predict,
    report,
    run,
    status,
    verify,
)
from launch.exit_codes import exit_code_of, raise_interrupt, show_warnings

DESCRIPTION = """\
Small neural networks that are robust to adversarial examples: pretrain with a robust objective, prune by scores that
the same objective learns (HYDRA), finetune, evaluate under attack, report.

Write the data, run a recipe, resume it if it was interrupted, and report:

  %(prog)s data write fashion_mnist --out data/fashion_mnist
  %(prog)s run recipes/fashion_mnist.yaml phases.pretrain.epochs=2 --name quick
  %(prog)s resume quick
  %(prog)s report quick

The same on a SLURM cluster:

  %(prog)s run recipes/imagenet_resnet50_linf4.yaml --on slurm --cluster my_cluster.yaml slurm.nodes=1-4
"""

COMMAND = "hydra-pipeline"
"""The script name in pyproject.toml."""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=COMMAND if Path(sys.argv[0]).name == COMMAND else "python -m launch",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(after_interrupt="nothing was changed")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    run.add_parser(commands)
    report.add_parser(commands)
    evaluate.add_parser(commands)
    predict.add_parser(commands)
    export.add_parser(commands)
    verify.add_parser(commands)
    benchmark.add_parser(commands)
    leaderboard.add_parser(commands)
    data.add_parser(commands)
    doctor.add_parser(commands)
    status.add_parser(commands)
    logs.add_parser(commands)
    return parser


def _refuse_shadowing_packages() -> None:
    """Errors: ValueError if the working folder has another package named like one of ours.

    A run's processes (`python -m`, Ray's workers) search the working folder first and would import that one.
    """
    for name in ("launch", "pipeline"):
        here, ours = importlib.machinery.PathFinder.find_spec(name, [""]), sys.modules[name].__file__
        if here is None or here.origin is None or ours is None or os.path.samefile(here.origin, ours):
            continue
        raise ValueError(
            f"{here.origin} would be imported in place of {ours} by the processes that this command starts; run it "
            "in another folder"
        )


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = build_parser()
    arguments, rest = parser.parse_known_args(argv)
    # argparse does not collect overrides that follow an option, as in `run RECIPE --name quick seed=1`.
    unrecognized = [text for text in rest if text.startswith("-") or "overrides" not in arguments]
    if unrecognized:
        parser.error(f"unrecognized arguments: {' '.join(unrecognized)}")
    if rest:
        arguments.overrides += rest
    return arguments


def main(argv: list[str] | None = None) -> int:
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A class or file may have a name that the terminal's encoding lacks. Standard error does this by itself.
        sys.stdout.reconfigure(errors="backslashreplace")
    show_warnings()
    arguments = _parse(argv)
    signal.signal(signal.SIGTERM, raise_interrupt)
    try:
        return exit_code_of(lambda: _handle(arguments))
    except KeyboardInterrupt:
        print(f"interrupted; {arguments.after_interrupt}", file=sys.stderr)
        return 1


def _handle(arguments: argparse.Namespace) -> int:
    _refuse_shadowing_packages()
    return arguments.handler(arguments)


if __name__ == "__main__":
    sys.exit(main())
