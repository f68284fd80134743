"""`python -m launch export`: a finished network as ONNX and torch files that run without this project."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from launch import run_folder
from pipeline.deployment.formats import FORMATS, Format
from pipeline.report.text_table import text_table
from pipeline.run.printable import printable_line
from pipeline.run.provenance import load_run_recipe

EXAMPLE = """\
Write a finished network as files that run without this project, each beside a compressed copy (.gz):

  onnx        float32, for ONNX Runtime, OpenVINO, TensorRT: normalisation inside, BatchNorm folded
  onnx-int8   int8 weights, in which pruned connections stay zero; ranges from held-out training images
  torch       a torch.export program: torch.export.load(FILE).module()

Input: images, float32 [n, 3, height, width] in [0, 1], any n. Output: logits. Each float32 file is compared with the
network before it is kept. Of a run, HYDRA's network is taken, or --method's.

  %(prog)s demo --keep 0.01
  %(prog)s runs/demo/keep-0.01/magnitude/model.safetensors --format onnx torch
"""


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "export",
        help="write a finished network as ONNX (float32, int8) and torch files",
        description=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("target", metavar="RUN|FILE", help="a run, or a model.safetensors")
    parser.add_argument("--keep", metavar="K", help="a run's network of this keep_fraction (1: dense)")
    parser.add_argument("--method", metavar="M", help="a run's network of this method, such as magnitude")
    parser.add_argument(
        "--format", nargs="+", choices=FORMATS, default=FORMATS, metavar="F", help=f"of {', '.join(FORMATS)}; all"
    )
    parser.add_argument("--out", type=Path, help="folder to write to (default: export/ beside the network)")
    parser.set_defaults(handler=_export, after_interrupt="files that were complete are kept")


def _export(arguments: argparse.Namespace) -> int:
    from pipeline.deployment.folder import export_network
    from pipeline.evaluation.load import load_network

    path = Path(arguments.target)
    target = path if path.suffix == ".safetensors" else run_folder.find_run(arguments.target)
    network = load_network(target, arguments.keep, method=arguments.method)
    folder = arguments.out or network.file.parent / "export"
    formats: tuple[Format, ...] = tuple(name for name in FORMATS if name in arguments.format)
    files = export_network(network, load_run_recipe(network.run) if network.run else None, formats, folder)
    source = network.file.stat().st_size
    rows = [["file", "bytes", "compressed", "of the safetensors file"]]
    for file in files:
        share = f"1/{source / file.compressed:.1f}"
        rows.append([printable_line(str(file.path)), f"{file.size:,}", f"{file.compressed:,}", share])
    print(text_table(rows, left=["file"]))
    return 0
