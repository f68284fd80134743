"""Checks of a file of torch.save before torch reads it: torch does not compare checksums, and trusts sizes.

`torch.load` with weights_only runs nothing that a file names but a list of harmless functions, two of which make bytes
of any length out of a few. It reads the parts of a zip archive without their CRC-32, so that a changed bit is a changed
weight, and unpacks compressed parts, of which torch.save writes none.
"""

from __future__ import annotations

import pickletools
import zipfile
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

ZIP_MAGIC = b"PK\x03\x04"
PICKLES = 5
"""How many a file of the format before zip archives begins with."""
ALLOCATING = ("bytearray", "encode")
"""Names, in builtins and codecs, that torch allows and no tensor needs."""
BLOCK_BYTES = 1 << 20


class RefusedFile(ValueError):
    """A file of weights is damaged or would take memory for what it does not hold; the message names it."""


def check_torch_file(path: Path) -> None:
    """Errors: RefusedFile for a file that is damaged or would take memory for what it does not hold; OSError.

    Any other exception means that the file is no zip archive or pickle.
    """
    with path.open("rb") as stream:
        if stream.read(len(ZIP_MAGIC)) != ZIP_MAGIC:
            stream.seek(0)
            for _ in range(PICKLES):
                _check_pickle(path, stream)
            return
    with zipfile.ZipFile(path) as archive:
        for part in archive.infolist():
            if part.compress_type != zipfile.ZIP_STORED:
                raise RefusedFile(
                    f"{path} was not read: {part.filename!r} in it is compressed, which torch.save never does"
                )
            _check_part(path, archive, part)


def _check_part(path: Path, archive: zipfile.ZipFile, part: zipfile.ZipInfo) -> None:
    try:
        with archive.open(part) as stream:
            while stream.read(BLOCK_BYTES):
                pass
    except zipfile.BadZipFile as error:
        raise RefusedFile(f"{path} is damaged ({error}); download it again") from None
    if part.filename.endswith("data.pkl"):
        with archive.open(part) as stream:
            _check_pickle(path, stream)


def _check_pickle(path: Path, stream: IO[bytes]) -> None:
    for instruction, argument, _ in pickletools.genops(stream):
        if instruction.name == "GLOBAL" and str(argument).rpartition(" ")[2] in ALLOCATING:
            name = str(argument).replace(" ", ".")
            raise RefusedFile(
                f"{path} was not read: it calls {name}, which no tensor needs and which can fill the memory"
            )


def check_tensor(path: Path, name: str, tensor: Tensor) -> None:
    """Refuse a large tensor that the file does not store value by value: copying it would make room for all of it.

    Errors: RefusedFile.
    """
    plain = tensor.layout == torch.strided and tensor.device.type == "cpu" and not tensor.is_quantized
    if not plain or tensor.numel() * tensor.element_size() > max(tensor.untyped_storage().nbytes(), BLOCK_BYTES):
        raise RefusedFile(
            f"{path}: {name} {list(tensor.shape)} is not stored value by value; save the state dict of plain tensors"
        )
