"""Checks an exported folder on any machine: the files are those that were exported, and answer as they did."""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from numpy.typing import NDArray
from onnxruntime.capi.onnxruntime_pybind11_state import Fail, InvalidArgument, InvalidGraph, InvalidProtobuf

from pipeline.deployment.attack_result import COLUMNS, SAME_LOGITS, attack_result
from pipeline.deployment.card import Card, ExportedFile
from pipeline.deployment.check_images import NETWORK, as_input, read_check_images
from pipeline.deployment.file_cost import onnx_weights
from pipeline.deployment.formats import CHECK_IMAGES, VERDICTS
from pipeline.deployment.onnx_file import logits_of
from pipeline.evaluation.chunks import read_verdicts
from pipeline.models.export import METADATA_KEY
from pipeline.run.files import sha256_of
from pipeline.run.layout import CARD

FLOAT_TOLERANCE = 1e-4
"""Largest difference of a float32 file's logits from the network's, as a share of the image's largest |logit|."""
UNREADABLE = (OSError, DecodeError, Fail, InvalidArgument, InvalidGraph, InvalidProtobuf)


def verify_folder(folder: Path) -> tuple[Card, list[str]]:
    """The folder's card, and one message per fault. Errors: ValueError if there is no card that can be read."""
    if not (folder / CARD).is_file():
        raise ValueError(f"{folder} has no {CARD}, so it is not an exported network; give the folder that export wrote")
    card = Card.read(folder / CARD)
    faults = [fault for name, sha256 in card.others_sha256.items() for fault in _changed(folder / name, sha256)]
    checks: dict[str, NDArray[Any]] = {}
    if not faults:
        try:
            checks = read_check_images(folder / CHECK_IMAGES)
            faults += _attack_fault(folder, card)
        except ValueError as error:
            faults.append(str(error))
    for file in card.files:
        fault = next(_faults_of(folder, file, card, checks), None)
        faults += [] if fault is None else [fault]
        faults += _copy_fault(folder / f"{file.name}.gz", file)
    return card, faults


def _changed(path: Path, sha256: str) -> list[str]:
    if not path.is_file():
        return [f"{path} is missing; copy the whole folder"]
    if sha256_of(path) != sha256:
        return [f"{path} is not the file that was exported: its sha256 is not that of {CARD}; copy it again"]
    return []


def _copy_fault(path: Path, file: ExportedFile) -> list[str]:
    if not path.is_file():
        return [f"{path} is missing; copy the whole folder"]
    try:
        with gzip.open(path) as stream:
            same = hashlib.file_digest(stream, "sha256").hexdigest() == file.sha256  # pyright: ignore[reportArgumentType]
    except (OSError, EOFError, zlib.error):
        same = False
    return [] if same else [f"{path} does not unpack to the file that was exported; copy it again"]


def _attack_fault(folder: Path, card: Card) -> list[str]:
    """Whether the card's accuracies are those of the verdicts beside it, of a file that is here."""
    attack = card.attack
    if attack is None:
        return []
    if card.file(attack.file_sha256) is None:
        return [f"{folder / CARD} has the robust accuracy of another file (sha256 {attack.file_sha256[:12]}...)"]
    try:
        verdicts = read_verdicts(folder / VERDICTS, *COLUMNS)
        counts = attack_result(attack, verdicts).counts()
    except (ValueError, TypeError) as error:
        return [str(error)]
    for name, value in counts.items():
        if value != attack.counts()[name]:
            return [f"{folder / CARD} says {name} {attack.counts()[name]}, and {VERDICTS} gives {value}; export again"]
    return []


def _faults_of(folder: Path, file: ExportedFile, card: Card, checks: dict[str, NDArray[Any]]) -> Iterator[str]:
    """The faults of one file; the first explains those that follow from it."""
    path = folder / file.name
    yield from _changed(path, file.sha256)
    if file.format == "torch":  # loading a program runs the pickles in it, and the folder may be a stranger's
        return
    try:
        model = onnx.load(path)
        metadata = {entry.key: entry.value for entry in model.metadata_props}
        if json.loads(metadata.get(METADATA_KEY, "null")) != card.network:
            yield f"{path} was exported from another network: its metadata is not that of {CARD}; export again"
        if (count := nonzero_weights(model)) != file.nonzero_weights:
            yield (
                f"{path} has {count:,} weights that are not zero, and the exported network {file.nonzero_weights:,}: "
                "the mask is not applied, or it is another network; export again"
            )
        if file.format == "onnx":
            yield from _answer_fault(path, checks, NETWORK, FLOAT_TOLERANCE)
        else:
            yield from _answer_fault(path, checks, file.name, SAME_LOGITS)
    except (*UNREADABLE, ValueError) as error:
        yield f"{path} cannot be run: {' '.join(str(error).split())[:300]}"


def _answer_fault(path: Path, checks: dict[str, NDArray[Any]], key: str, tolerance: float) -> Iterator[str]:
    """Compare the file's logits for the stored images with those that are stored under `key`."""
    if not checks:  # a fault that is reported
        return
    expected = checks.get(key)
    if expected is None:
        yield f"{path} has no logits in {CHECK_IMAGES} to compare with; export again"
        return
    got = logits_of(path, as_input(checks["images"]))
    if got.shape != expected.shape:
        yield f"{path} has logits of shape {list(got.shape)}, and {CHECK_IMAGES} {list(expected.shape)}; export again"
        return
    gap = float((np.abs(got - expected).max(1) / np.maximum(np.abs(expected).max(1), 1e-12)).max())
    if not gap <= tolerance:  # also for NaN
        yield (
            f"{path} answers otherwise than when it was exported: logits for the images of {CHECK_IMAGES} differ by "
            f"{100 * gap:.3g} % of the largest, and {100 * tolerance:g} % is rounding; it is another network or "
            "normalisation, or this processor sums int8 products in 16 bits (export for it with --format onnx)"
        )


def nonzero_weights(model: onnx.ModelProto) -> int:
    """Weights of convolutions and linear layers that are not zero; int8 ones, before their scale."""
    weights = {tensor.name: tensor for _, tensor in onnx_weights(model)}
    return sum(int(np.count_nonzero(onnx.numpy_helper.to_array(tensor))) for tensor in weights.values())
