"""`python -m launch benchmark`: size and speed of finished networks on this machine."""

from __future__ import annotations

import argparse
import tempfile
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from launch import run_folder
from pipeline.recipe.fields import canonical_decimal
from pipeline.recipe.stages import Stage, stages_of
from pipeline.run.files import atomic_write_json, sha256_of
from pipeline.run.layout import RunFolder, StageFolder
from pipeline.run.printable import printable_line
from pipeline.run.provenance import load_run_recipe

if TYPE_CHECKING:
    from pipeline.deployment.subjects import Subject

EXAMPLE = """\
Measure what pruning is worth on this machine: bytes on disk and compressed, weights kept, multiply-accumulates, latency
of one image and throughput in batches of 32, on one thread and on all. Each network in torch (channels-last), and as
ONNX files in float32 and int8 in ONNX Runtime, and in OpenVINO where it is installed (pip install -e .[openvino]). All
run in turn, in one process, and the ratios to the dense network in torch, float32, are of one round each, so that other
load on the machine affects both alike.

Of a run, the dense network and every pruned one; tables are printed, and benchmark.json and benchmark.png are written
to it, which `report` reads. Files: model.safetensors (as above), .onnx and .pt2 files (as they are).

  %(prog)s demo
  %(prog)s demo --keep 0.01 --method magnitude
  %(prog)s runs/demo/keep-0.01/finetune/export/model-int8.onnx --json speed.json
"""
SUFFIXES = (".safetensors", ".onnx", ".pt2")


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "benchmark",
        help="measure size and speed of finished networks on this machine",
        description=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("targets", nargs="+", metavar="RUN|FILE", help=f"a run, or {', '.join(SUFFIXES)} files")
    parser.add_argument("--keep", metavar="K", help="a run's networks of this keep_fraction only, beside the dense one")
    parser.add_argument("--method", metavar="M", help="a run's networks of this method only, such as magnitude")
    parser.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        help="write the results to this file, and the picture beside it (default: of a run, its benchmark.json)",
    )
    parser.set_defaults(handler=_benchmark, after_interrupt="nothing was written")


def _benchmark(arguments: argparse.Namespace) -> int:
    files = _files(arguments)
    json_file = arguments.json
    if json_file is not None and (json_file.suffix != ".json" or not json_file.parent.is_dir()):
        raise ValueError(f"--json {json_file}: give a name that ends in .json, in a folder that exists")
    with tempfile.TemporaryDirectory(prefix="benchmark-") as temporary, _Bar() as bar:
        if files:
            subjects = _file_subjects(files, Path(temporary), bar)
        else:
            run = run_folder.find_run(arguments.targets[0])
            json_file = json_file or RunFolder(run).benchmark
            subjects = _run_subjects(run, arguments, Path(temporary), bar)

        from pipeline.deployment.benchmark import run_benchmark

        benchmark = run_benchmark(subjects, bar.show)

    from pipeline.report.benchmark_chart import draw_benchmark
    from pipeline.report.benchmark_table import benchmark_tables

    print(benchmark_tables(benchmark))
    if json_file is not None:
        draw_benchmark(benchmark, json_file.with_suffix(".png"))
        atomic_write_json(json_file, benchmark.to_json())
    return 0


def _files(arguments: argparse.Namespace) -> list[Path]:
    """The files that are given; empty for a run. Errors: ValueError."""
    files = [Path(target) for target in arguments.targets if Path(target).suffix in SUFFIXES]
    if (files and len(files) < len(arguments.targets)) or (not files and len(arguments.targets) > 1):
        raise ValueError(f"{' '.join(arguments.targets)}: give one run, or only files ({', '.join(SUFFIXES)})")
    for name in ("keep", "method"):
        if files and getattr(arguments, name) is not None:
            raise ValueError(f"--{name} {getattr(arguments, name)} selects networks of a run, and {files[0]} is a file")
    for path in files:
        if not path.is_file():
            raise ValueError(f"{path} does not exist")
    return files


def _file_subjects(files: list[Path], folder: Path, bar: _Bar) -> list[Subject]:
    """The dense network of the first architecture that a file names, if one does, and the files. Errors: ValueError."""
    from pipeline.deployment.subjects import Origin, dense_reference, file_subjects

    subjects: list[Subject] = []
    for number, path in enumerate(files):
        bar.show(f"preparing {path.name}", number, len(files))
        (part := folder / str(number)).mkdir()
        subjects += file_subjects(path, Origin(printable_line(str(path))), part)
    reference = dense_reference(subjects, folder)
    return subjects if reference is None else [reference, *subjects]


def _run_subjects(run: Path, arguments: argparse.Namespace, folder: Path, bar: _Bar) -> list[Subject]:
    """The dense network of a run, and its pruned ones as --keep and --method select them. Errors: ValueError."""
    from pipeline.deployment.subjects import Origin, network_subjects
    from pipeline.evaluation.load import load_network
    from pipeline.report.results import pruned_text

    stages = _stages(run, arguments.keep, arguments.method)
    subjects: list[Subject] = []
    for number, stage in enumerate(stages):
        keep = _keep_fraction(stage)
        title = stage.title if stage.method is None else f"{stage.title}, {pruned_text(keep)} pruned"
        bar.show(f"preparing {title}", number, len(stages))
        network = load_network(run, keep, method=stage.label, stage=stage.phase)
        (part := folder / str(number)).mkdir()
        origin = Origin(title, stage.title, canonical_decimal(keep), sha256_of(network.file))
        subjects += network_subjects(network, origin, part)
    return subjects


def _stages(run: Path, keep: str | None, method: str | None) -> list[Stage]:
    """The finished dense stage, and the other finished stages that are selected. Errors: ValueError."""
    stages = [stage for stage in stages_of(load_run_recipe(run)) if stage.measure is not None]
    names = {
        "keep": (keep if keep is None else _canonical(keep), lambda stage: canonical_decimal(_keep_fraction(stage))),
        "method": (method if method is None else method.lower(), lambda stage: stage.label),
    }
    pruned = [stage for stage in stages if stage.method is not None]
    for option, (value, name_of) in names.items():
        there = dict.fromkeys(map(name_of, pruned))
        if value is not None and value not in there:
            raise ValueError(f"--{option} {value}: {run} has no such network; there is {', '.join(there)}")
        pruned = [stage for stage in pruned if value in (None, name_of(stage))]
    finished = [stage for stage in stages if StageFolder(run / stage.name).result.is_file()]
    dense = [stage for stage in finished if stage.method is None]
    selected = [stage for stage in finished if stage in pruned]
    if not dense or (not selected and (keep or method)):
        missing = "dense network" if not dense else "network of this --keep and --method"
        raise ValueError(f"{run} has no finished {missing} yet; continue with: python -m launch resume {run}")
    return dense + selected


def _keep_fraction(stage: Stage) -> Decimal:
    return Decimal(1) if stage.keep_fraction is None else stage.keep_fraction


def _canonical(keep: str) -> str:
    """0.10 and 1e-1 are both 0.1."""
    try:
        return canonical_decimal(Decimal(keep))
    except InvalidOperation:
        return keep


class _Bar:
    """What is prepared or measured, and how far, on a terminal."""

    def __init__(self) -> None:
        self._bar: tqdm[Any] = tqdm(disable=None, dynamic_ncols=True, unit="")

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def show(self, what: str, done: int, total: int) -> None:
        self._bar.set_description(what, refresh=False)
        self._bar.total, self._bar.n = total, done
        self._bar.refresh()
