"""`python -m launch verify`: whether an exported folder is what was exported, on this machine too."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from launch.exit_codes import print_error

EXAMPLE = """\
Check a folder that `export` wrote, on any machine: hashes of all files, that the compressed copies unpack to them, that
pruned connections are zero, that the ONNX files answer to a few stored images as they did when they were exported, and
that the card's robust accuracy is that of the verdicts beside it. Nothing that a file holds is run as code: a torch
program is compared by its hash alone.

  %(prog)s runs/demo/keep-0.01/finetune/export

Exit codes: 0 nothing is wrong; 1 faults, one line for each; 2 no such folder, or no card in it that can be read.
"""


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "verify",
        help="check an exported folder: hashes, masks, answers to stored images",
        description=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="a folder that export wrote")
    parser.set_defaults(handler=_verify)


def _verify(arguments: argparse.Namespace) -> int:
    from pipeline.deployment.verification import verify_folder

    card, faults = verify_folder(arguments.folder)
    for fault in faults:
        print_error(fault)
    if not faults:
        stamp = "stamped" if card.stamped else "not stamped: README.md says why"
        print(f"{', '.join(file.name for file in card.files)}: as exported; {stamp}")
    return 1 if faults else 0
