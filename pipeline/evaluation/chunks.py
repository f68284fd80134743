"""Verdicts on disk: complete evaluations, and the finished chunks of one in progress."""

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
"""Polling interval of a finished worker that waits for the others' chunks."""


class ChunkStore:
    """Verdicts of finished chunks, one parquet file each, next to the header of their evaluation."""

    def __init__(self, folder: Path, header: dict[str, Any]) -> None:
        self.folder, self._header = folder, header

    def open(self) -> dict[int, Verdicts]:
        """Load the chunks in the store. Chunks of another header and damaged chunks are deleted."""
        path = self.folder / "header.json"
        try:
            is_current = read_json(path) == self._header
        except ValueError:
            is_current = False
        if not is_current:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True)
            atomic_write_json(path, self._header)
        chunks = {}
        self._stop_file.unlink(missing_ok=True)
        for index, file in self._files().items():
            try:
                chunks[index] = read_verdicts(file)
            except (OSError, pa.ArrowInvalid):
                file.unlink()
        return chunks

    def _files(self) -> dict[int, Path]:
        return {int(file.stem.removeprefix("chunk-")): file for file in self.folder.glob("chunk-*.parquet")}

    @property
    def _stop_file(self) -> Path:
        return self.folder / "stopped"

    def stop(self) -> None:
        """Notify waiting workers that some chunks will not be written."""
        self._stop_file.touch()

    def wait(self, count: int, give_up: Callable[[], bool]) -> None:
        """Block until there are `count` chunks, a worker has stopped, or `give_up()` returns True."""
        while len(self._files()) < count and not self._stop_file.exists() and not give_up():
            time.sleep(WAIT_S)

    def put(self, index: int, verdicts: Verdicts) -> None:
        write_verdicts(self.folder / f"chunk-{index:06d}.parquet", verdicts)

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


def write_verdicts(path: Path, verdicts: Verdicts) -> None:
    """Write parquet atomically."""
    temporary = path.with_name(f".{path.name}.tmp")
    with naming(path):
        pq.write_table(pa.table(dict(verdicts)), temporary)
    temporary.replace(path)


def read_verdicts(path: Path) -> Verdicts:
    table = pq.read_table(path)
    return {name: table[name].to_numpy() for name in table.column_names}
