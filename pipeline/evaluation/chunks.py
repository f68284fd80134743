"""Verdicts on disk: whole evaluations, and the finished chunks of one that is under way."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.evaluation.measures.base import Verdicts
from pipeline.run.files import atomic_write_json, naming, read_json

WAIT_S = 0.2
"""How often a worker that is done checks for the others' chunks."""


class ChunkStore:
    """Verdicts of finished chunks: one parquet file each, below a header that says what they are verdicts of."""

    def __init__(self, folder: Path, header: dict[str, Any]) -> None:
        self.folder, self._header = folder, header

    def open(self) -> dict[int, Verdicts]:
        """The chunks that are there. Those of another header, and damaged ones, are removed."""
        path = self.folder / "header.json"
        try:
            same = read_json(path) == self._header
        except ValueError:
            same = False
        if not same:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True)
            atomic_write_json(path, self._header)
        chunks = {}
        self._stopped.unlink(missing_ok=True)
        for index, file in self._files().items():
            try:
                chunks[index] = read_verdicts(file)
            except (OSError, pa.ArrowInvalid):
                file.unlink()
        return chunks

    def _files(self) -> dict[int, Path]:
        return {int(file.stem.removeprefix("chunk-")): file for file in self.folder.glob("chunk-*.parquet")}

    @property
    def _stopped(self) -> Path:
        return self.folder / "stopped"

    def stop(self) -> None:
        """Let those that wait know that not all chunks will come."""
        self._stopped.touch()

    def wait(self, count: int, give_up: Callable[[], bool]) -> None:
        """Return once `count` chunks are there, somebody has stopped, or `give_up()`."""
        while len(self._files()) < count and not self._stopped.exists() and not give_up():
            time.sleep(WAIT_S)

    def put(self, index: int, verdicts: Verdicts) -> None:
        write_verdicts(self.folder / f"chunk-{index:06d}.parquet", verdicts)

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


def write_verdicts(path: Path, verdicts: Verdicts) -> None:
    """As parquet; whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    with naming(path):
        pq.write_table(pa.table(dict(verdicts)), temporary)
    temporary.replace(path)


def read_verdicts(path: Path) -> Verdicts:
    table = pq.read_table(path)
    return {name: table[name].to_numpy() for name in table.column_names}
