"""`python -m launch report`: table, HTML page, charts and CSV of one or more runs."""

from __future__ import annotations

import argparse
import logging
from typing import Any

from launch import run_folder
from pipeline.run.printable import printable

log = logging.getLogger(__name__)


def add_parser(subparsers: Any) -> None:
    report = subparsers.add_parser(
        "report",
        help="table, HTML page, charts and CSV of one or more runs (such as seeds)",
        description="Write runs/RUN/report/ and print its table. Several runs (such as seeds) are compared.",
    )
    report.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        help="name of a run under runs/, or its folder; the report is written to the first",
    )
    report.set_defaults(handler=_report)


def _report(arguments: argparse.Namespace) -> int:
    from pipeline.report.build import PAGE, build_report  # matplotlib is loaded only here
    from pipeline.report.wandb_report import log_report

    folders = [run_folder.find_run(name) for name in arguments.runs]
    try:
        text = build_report(folders)
    except OSError as error:
        raise ValueError(
            f"the report cannot be written: {error}; of several runs, name one of your own first"
        ) from None
    print(printable(text))
    print(f"charts and CSV: {folders[0] / 'report'}/")
    print(f"page: {folders[0] / 'report' / PAGE}")
    for folder in folders:
        try:
            log_report(folder, alone=len(folders) == 1)
        except OSError as error:
            log.warning("the report of %s is not in wandb: %s", folder, error)
    return 0
