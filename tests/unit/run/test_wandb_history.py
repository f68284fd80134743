"""wandb's files are read up to their last intact record, wherever they end and whatever they contain."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.run.tracking.wandb_history import Record, count_recorded_rows, read_records

BLOCK = 32768


def history(number: int, size: int) -> Any:
    record = Record()
    record.history.step.num = number
    record.history.item.add(key="text", value_json="x" * size)
    return record


def write_log(records: list[Any]) -> tuple[bytes, list[int]]:
    """A log in LevelDB's documented format, and the offset of each record's end."""
    log, ends = bytearray(struct.pack("<4sHB", b":W&B", 0xBEE1, 0)), []
    for record in records:
        left, first = record.SerializeToString(), True
        while True:
            room = BLOCK - len(log) % BLOCK
            if room < 7:
                log += bytes(room)
                continue
            piece, left = left[: room - 7], left[room - 7 :]
            kind = {(True, True): 1, (True, False): 2, (False, False): 3, (False, True): 4}[first, not left]
            log += struct.pack("<IHB", zlib.crc32(bytes([kind]) + piece), len(piece), kind) + piece
            first = False
            if not left:
                break
        ends.append(len(log))
    return bytes(log), ends


@settings(max_examples=60)
@given(
    sizes=st.lists(st.integers(0, 200) | st.integers(BLOCK - 80, BLOCK + 20) | st.just(3 * BLOCK), max_size=6),
    torn=st.floats(0, 1),
    data=st.data(),
)
def test_intact_records_are_read(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], torn: float, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("log") / "offline-run-20260101_000000-abc"
    folder.mkdir()
    path, records = folder / "run-abc.wandb", [history(number, size) for number, size in enumerate(sizes)]
    log, ends = write_log(records)
    path.write_bytes(log)
    assert list(read_records(path)) == records
    assert count_recorded_rows(folder.parent, "abc") == len(records)
    assert count_recorded_rows(folder.parent, "other") == 0

    end = int(torn * len(log))
    path.write_bytes(log[:end])
    whole = sum(record_end <= end for record_end in ends)
    assert list(read_records(path)) == records[:whole]
    assert count_recorded_rows(folder.parent, "abc") == whole

    place = data.draw(st.integers(0, len(log) - 1))
    path.write_bytes(log[:place] + bytes([log[place] ^ 0x55]) + log[place + 1 :])
    assert list(read_records(path)) in ([], records, *(records[:n] for n in range(len(records))))


def test_other_files_have_no_records(tmp_path: Path) -> None:
    path = tmp_path / "run-abc.wandb"
    for content in (b"", b":W&", b"PK\x03\x04 something else entirely", b":W&B\xe1\xbe\x00" + bytes(100)):
        path.write_bytes(content)
        assert list(read_records(path)) == []
