"""`python -m launch leaderboard`: a run's entries for RobustBench and the adversarial pruning benchmark."""

from __future__ import annotations

import argparse
import re
from typing import Any

from launch import run_folder
from pipeline.run.layout import RunFolder
from pipeline.run.printable import printable

ID = r"[A-Za-z0-9-]+"
EXAMPLE = """\
Write leaderboard entries for the networks of a run that have AutoAttack verdicts (from `evaluate --attack autoattack`).

  %(prog)s first --id Doe2026Small --title "Small robust networks" --authors "Jane Doe, John Roe" \\
      --link https://arxiv.org/abs/0000.00000
"""


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "leaderboard",
        help="write a run's entries for RobustBench and the adversarial pruning benchmark",
        description=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", metavar="RUN", help="name of a run under runs/, or its folder")
    parser.add_argument(
        "--id", required=True, help="<first author><year><first word of the title>, for example Doe2026Small"
    )
    parser.add_argument("--title", required=True, help="title of the paper")
    parser.add_argument("--authors", required=True, help="its authors, separated by commas")
    parser.add_argument("--link", required=True, help="URL of the paper")
    parser.add_argument(
        "--venue", default="Unpublished", help="where it appeared, for example NeurIPS 2026 (default: %(default)s)"
    )
    parser.set_defaults(handler=_leaderboard)


def _leaderboard(arguments: argparse.Namespace) -> int:
    if not re.fullmatch(ID, arguments.id):
        raise ValueError(f"--id {arguments.id}: expected letters, digits and dashes, for example Doe2026Small")

    from pipeline.report.leaderboards import Paper, write_leaderboards
    from pipeline.report.results import read_runs

    folder = run_folder.find_run(arguments.run)
    paper = Paper(arguments.id, arguments.title, arguments.authors, arguments.link, arguments.venue)
    files, left_out = write_leaderboards(read_runs([folder])[0], paper, RunFolder(folder).report / "leaderboards")
    for path in files:
        print(path)
    for reason in left_out:
        print(printable(f"not for {reason}"))
    return 0
