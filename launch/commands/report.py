"""`python -m launch report`: table, HTML page, charts and CSV of one or several runs."""

from __future__ import annotations

import argparse
import logging
from typing import Any

from launch import run_folder

log = logging.getLogger(__name__)


def add_parser(subparsers: Any) -> None:
    report = subparsers.add_parser("report", help="table, HTML page, pictures and CSV of one or several runs (seeds)")
    report.add_argument("runs", nargs="+", metavar="RUN", help="name under runs/, or the folder")
    report.set_defaults(handler=_report)


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
