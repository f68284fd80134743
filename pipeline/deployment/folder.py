"""The folder of one exported network: its files in every format, each beside a compressed copy."""

from __future__ import annotations

import gzip
import shutil
import tempfile
from pathlib import Path

import onnx

from pipeline.deployment.attack_result import FileAttackResult
from pipeline.deployment.calibration import calibration_batches
from pipeline.deployment.card import Card, ExportedFile, write_card
from pipeline.deployment.check_images import write_check_images
from pipeline.deployment.description import describe
from pipeline.deployment.formats import CHECK_IMAGES, COMPRESSION, FILES, VERDICTS, Format
from pipeline.deployment.image_size import image_size_of
from pipeline.deployment.int8_file import write_int8
from pipeline.deployment.model_card import model_card
from pipeline.deployment.onnx_file import write_onnx
from pipeline.deployment.smaller_network import has_pruned_channels, write_smaller
from pipeline.deployment.torch_program import write_program
from pipeline.deployment.verification import nonzero_weights
from pipeline.evaluation.chunks import write_verdicts
from pipeline.evaluation.honesty.exported_file import mask_check
from pipeline.evaluation.load import LoadedNetwork
from pipeline.evaluation.measures.base import Verdicts
from pipeline.recipe.schema import Recipe
from pipeline.run.files import atomic_write_text, make_folder, replacing, sha256_of
from pipeline.run.layout import CARD, MODEL_CARD

SMALLER = "model.safetensors"
"""The network without its pruned channels, which `pipeline.load` reads."""


def export_network(network: LoadedNetwork, recipe: Recipe | None, formats: tuple[Format, ...], folder: Path) -> Card:
    """Write the network to `folder` in each of `formats`, and its card; files that are there are replaced.

    If its channels were pruned, all files are of the network without them, and it is written as model.safetensors, too.
    `recipe` is that of its run, whose held-out images calibrate int8. The result of an attack on the same file, from
    an earlier export, is kept. Errors: CannotExport; ValueError for int8 without a recipe, or a mask that was not
    applied; DataError.
    """
    if "onnx-int8" in formats and recipe is None:
        raise ValueError(
            f"{network.file} is not inside a run, whose held-out images would choose the ranges of int8; export the "
            "run, or use --format onnx torch"
        )
    size = image_size_of(network)
    if network.metadata.get("keep_fraction") and (check := mask_check(network.file)).status != "pass":
        raise ValueError(f"{network.file} is not exported: {check.figure}. {check.meaning}")
    make_folder(folder)
    written: list[ExportedFile] = []
    exported, others = network, [CHECK_IMAGES]
    if has_pruned_channels(network):
        exported, others = write_smaller(network, size, folder / SMALLER), [CHECK_IMAGES, SMALLER]
    with tempfile.TemporaryDirectory(prefix=".export-", dir=folder) as temporary:
        # int8 is made from the float file, which is kept only if it is asked for.
        float_file = (folder if "onnx" in formats else Path(temporary)) / FILES["onnx"]
        if {"onnx", "onnx-int8"} & set(formats):
            write_onnx(exported, size, float_file, exported.metadata)
        for name in formats:
            path = folder / FILES[name]
            if name == "onnx-int8":
                assert recipe is not None
                write_int8(float_file, calibration_batches(exported, recipe), path)
            elif name == "torch":
                write_program(exported, size, path)
            written.append(_described(name, path))
    answers = {file.name: folder / file.name for file in written if file.format != "torch"}
    write_check_images(folder / CHECK_IMAGES, exported, size, answers)
    hashes = {name: sha256_of(folder / name) for name in others}
    card = describe(network, recipe, size, written, hashes).model_copy(update={"network": exported.metadata})
    attack = _earlier_attack(folder, card)
    return _write(folder, card if attack is None else _with_attack(folder, card, attack))


def write_attack(folder: Path, card: Card, attack: FileAttackResult, verdicts: Verdicts) -> Card:
    """Add the result of an attack on one of the card's files."""
    write_verdicts(folder / VERDICTS, verdicts)
    return _write(folder, _with_attack(folder, card, attack))


def _write(folder: Path, card: Card) -> Card:
    write_card(folder, card)
    atomic_write_text(folder / MODEL_CARD, model_card(card))
    return card


def _with_attack(folder: Path, card: Card, attack: FileAttackResult) -> Card:
    others = card.others_sha256 | {VERDICTS: sha256_of(folder / VERDICTS)}
    return card.model_copy(update={"attack": attack, "others_sha256": others})


def _earlier_attack(folder: Path, card: Card) -> FileAttackResult | None:
    """The attack of the card that is there, if it was on a file that is the same now."""
    try:
        earlier = Card.read_if_there(folder / CARD)
    except ValueError:
        return None
    attack = earlier.attack if earlier is not None else None
    verdicts = earlier.others_sha256.get(VERDICTS) if earlier is not None else None
    if attack is None or card.file(attack.file_sha256) is None or not (folder / VERDICTS).is_file():
        return None
    return attack if sha256_of(folder / VERDICTS) == verdicts else None


def _described(name: Format, path: Path) -> ExportedFile:
    count = None if name == "torch" else nonzero_weights(onnx.load(path))
    size, compressed = path.stat().st_size, _compress(path)
    return ExportedFile(format=name, size=size, compressed=compressed, sha256=sha256_of(path), nonzero_weights=count)


def _compress(path: Path) -> int:
    """Write <path>.gz, the same bytes for the same file; returns its size."""
    with replacing(path.with_name(path.name + ".gz")) as temporary:
        with (
            path.open("rb") as source,
            temporary.open("wb") as raw,
            gzip.GzipFile("", "wb", COMPRESSION, raw, mtime=0) as stream,
        ):
            shutil.copyfileobj(source, stream)
        return temporary.stat().st_size
