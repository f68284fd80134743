"""`python -m launch predict`: the classes that a finished network assigns to image files."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch import run_folder
from pipeline.recipe.methods import HYDRA
from pipeline.recipe.stages import DENSE, stages_of
from pipeline.report.text_table import text_table
from pipeline.run.layout import StageFolder
from pipeline.run.printable import printable_line
from pipeline.run.provenance import load_run_recipe

if TYPE_CHECKING:
    from pipeline.evaluation.load import LoadedNetwork

EXAMPLE = """\
Predict the classes of image files with a finished network, which sees them as it sees test images: resized and cropped
as its model.safetensors says. Prints a table; of a run, its sparsest finished HYDRA network is taken.

  %(prog)s demo shirt.png boot.jpg
  %(prog)s runs/demo/keep-0.01/finetune/model.safetensors --json photos/*.jpg
"""
BATCH = 64
NAMED = 10
"""Unreadable images that the error message names."""


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "predict",
        help="classes and probabilities of image files, by a finished network",
        description=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("target", metavar="RUN|FILE", help="a run, or a model.safetensors")
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="image files")
    parser.add_argument(
        "--json", action="store_true", help="one line of JSON per image, with the probabilities of all classes"
    )
    parser.set_defaults(handler=_predict)


def _predict(arguments: argparse.Namespace) -> int:
    """Errors: ValueError naming images that cannot be read, after the others are printed."""
    network = _load(arguments.target)
    unreadable: list[str] = []
    rows = _predictions(network, arguments.images, unreadable)
    if arguments.json:
        for row in rows:
            print(json.dumps(row), flush=True)
    else:
        cells = [["image", "class", "probability"]]
        for row in rows:
            names = (printable_line(row[key]) for key in ("file", "class"))
            cells.append([*names, f"{100 * row['probability']:.1f} %"])
        if len(cells) > 1:
            print(text_table(cells, left=["image", "class"]))
            print(printable_line(_description(network)))
    if unreadable:
        more = f"\nand {len(unreadable) - NAMED} more" if len(unreadable) > NAMED else ""
        raise ValueError(
            f"{len(unreadable)} of {len(arguments.images)} images cannot be used:\n"
            + "\n".join(map(printable_line, unreadable[:NAMED]))
            + more
        )
    return 0


def _load(target: str) -> LoadedNetwork:
    """The network in a file, or the sparsest finished HYDRA network of a run (the dense one if there is no other)."""
    from pipeline.evaluation.load import load_network

    if Path(target).suffix == ".safetensors":
        return load_network(target)
    folder = run_folder.find_run(target)
    stages = [stage for stage in stages_of(load_run_recipe(folder)) if stage.measure is not None]
    finished = [stage for stage in stages if StageFolder(folder / stage.name).result.is_file()]
    own = [stage for stage in finished if stage.label in (HYDRA.label, DENSE)]
    if not own:
        raise ValueError(f"{folder} has no finished network yet; continue with: python -m launch resume {folder}")
    keep, sparsest = min(((stage.keep_fraction or Decimal(1), stage) for stage in own), key=lambda pair: pair[0])
    return load_network(folder, keep, method=sparsest.label, stage=sparsest.phase)


def _predictions(network: LoadedNetwork, paths: list[Path], unreadable: list[str]) -> Iterator[dict[str, Any]]:
    """One row per readable image, in order; messages about the others are appended to `unreadable`."""
    import torch

    preprocess = network.preprocess
    for start in range(0, len(paths), BATCH):
        images, readable = [], []
        for path in paths[start : start + BATCH]:
            try:
                images.append(preprocess(path))
                readable.append(path)
            except ValueError as error:
                unreadable.append(str(error))
        if not images:
            continue
        with torch.no_grad():
            shares = network(torch.stack(images)).softmax(dim=1)
        for path, of_classes in zip(readable, shares.tolist(), strict=True):
            label = max(range(len(of_classes)), key=of_classes.__getitem__)
            row = {"file": str(path), "label": label, "class": network.class_names[label]}
            yield row | {"probability": of_classes[label], "probabilities": of_classes}


def _description(network: LoadedNetwork) -> str:
    """The network, and how accurate it is on its test set, if it lies in a run that is evaluated."""
    evaluation, text = network.evaluation, str(network.file)
    if evaluation is None:
        return f"{text}; not evaluated here, so its accuracy is unknown"
    clean, robust = (100 * evaluation.accuracy(kind).value for kind in ("clean", "robust"))
    on = f"on {evaluation.images:,} test images"
    return f"{text}: clean accuracy {clean:.2f} %, robust accuracy {robust:.2f} % {on} ({evaluation.title})"
