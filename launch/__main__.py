"""The command line: `hydra-pipeline --help`, or `python -m launch --help`.

`runs/` and relative paths count from the folder that the command is given in.
Exit codes: 0 done, 1 failed, 2 wrong usage, recipe or data. Those of the second kind are messages without traceback.
"""

from __future__ import annotations

import argparse
import importlib.machinery
import logging
import os
import signal
import sys
from pathlib import Path
from types import FrameType

from launch.commands import data, evaluate, leaderboard, logs, report, run, status

DESCRIPTION = """\
Small neural networks that withstand adversarial examples: pretrain robustly, prune by scores that the robust objective
learns (HYDRA), finetune, evaluate, report.

  %(prog)s data write fashion_mnist --out data/fashion_mnist
  %(prog)s run recipes/fashion_mnist.yaml phases.pretrain.epochs=2 --name quick
  %(prog)s resume quick
  %(prog)s report quick

  %(prog)s run recipes/imagenet_resnet50_linf4.yaml --on slurm --cluster my_cluster.yaml slurm.nodes=1-4
"""

COMMAND = "hydra-pipeline"
"""As pyproject.toml names it."""


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
    leaderboard.add_parser(commands)
    data.add_parser(commands)
    status.add_parser(commands)
    logs.add_parser(commands)
    return parser


def _refuse_shadowing_packages() -> None:
    """Errors: ValueError if the working folder has a package of our name that is not ours.

    The processes of a run (`python -m`, Ray's workers) would import that one, as they search the working folder first.
    """
    for name in ("launch", "pipeline"):
        here, ours = importlib.machinery.PathFinder.find_spec(name, [""]), sys.modules[name].__file__
        if here is None or here.origin is None or ours is None or os.path.samefile(here.origin, ours):
            continue
        raise ValueError(
            f"{here.origin} would be imported in place of {ours} by the processes that this command starts; give it "
            "in another folder"
        )


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
        _refuse_shadowing_packages()
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
