"""Reads wandb's own files, `run-<id>.wandb`: the rows that were really logged, even by a process that was killed.

Such a file is a header of 7 bytes followed by a log in LevelDB's format (its doc/log_format.md): blocks of 32 KiB that
hold fragments of records, each preceded by its CRC-32, length and kind. A record is a `Record` of wandb's protocol.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

IDENTITY = b":W&B"
FILE_HEADER = struct.Struct("<4sHB")
PIECE_HEADER = struct.Struct("<IHB")
BLOCK = 32 << 10
Record: Any = wandb_internal_pb2.Record  # pyright: ignore[reportAttributeAccessIssue] created at import
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def read_records(path: Path) -> Iterator[Any]:
    """The records of a file in order, up to its end or the first damage. Errors: OSError."""
    data = path.read_bytes()
    if len(data) < FILE_HEADER.size or FILE_HEADER.unpack_from(data)[0] != IDENTITY:
        return
    position, parts = FILE_HEADER.size, b""
    while position + PIECE_HEADER.size <= len(data):
        if BLOCK - position % BLOCK < PIECE_HEADER.size:  # no header fits: the block is padded with zeros
            position += BLOCK - position % BLOCK
            continue
        checksum, length, kind = PIECE_HEADER.unpack_from(data, position)
        position += PIECE_HEADER.size
        piece = data[position : position + length]
        if len(piece) < length or zlib.crc32(bytes([kind]) + piece) != checksum:
            return
        position += length
        parts = piece if kind in (FULL, FIRST) else parts + piece
        if kind in (FULL, LAST):
            yield Record.FromString(parts)


def count_recorded_rows(folder: Path, run_id: str) -> int:
    """Number of rows in all files of a wandb run in `folder`: the largest row number, from 0, plus one."""
    count = 0
    for path in folder.glob(f"*run-*-{run_id}*/run-{run_id}.wandb"):
        for record in read_records(path):
            if record.HasField("history"):
                count = max(count, record.history.step.num + 1)
    return count
