"""Verdicts on disk: complete evaluations, and the finished chunks of one in progress."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.evaluation.measures.base import Verdicts
from pipeline.regular_file import read_regular
from pipeline.run.files import atomic_write_json, make_folder, read_json, replacing, touch

WAIT_S = 0.2
"""Polling interval of a finished worker that waits for the others' chunks."""
REQUIRED = ("sample_id", "clean_correct", "robust_correct")
"""Columns that all verdicts have."""
KINDS_OF = {
    **{"sample_id": ("i", "u"), "clean_correct": ("b",), "robust_correct": ("b",)},
    **{"label": ("i", "u"), "clean_prediction": ("i", "u")},
}
"""Column of verdicts -> kinds of its dtype; others may have any of ANY."""
ANY = ("b", "i", "u", "f")
AGAIN = "delete it with its .json and evaluate again"


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
            make_folder(self.folder)
            atomic_write_json(path, self._header)
        chunks = {}
        self._stop_file.unlink(missing_ok=True)
        for index, file in self._files().items():
            try:
                chunks[index] = read_verdicts(file)
            except ValueError:
                file.unlink()
        return chunks

    def _files(self) -> dict[int, Path]:
        return {int(file.stem.removeprefix("chunk-")): file for file in self.folder.glob("chunk-*.parquet")}

    @property
    def _stop_file(self) -> Path:
        return self.folder / "stopped"

    def stop(self) -> None:
        """Notify waiting workers that some chunks will not be written."""
        touch(self._stop_file)

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
    with replacing(path) as temporary:
        pq.write_table(pa.table(dict(verdicts)), temporary)


def read_verdicts(path: Path, *measured: str) -> Verdicts:
    """Read parquet, which must have the columns `measured` too.

    Errors: ValueError naming the file if it is missing or damaged, or holds no such verdicts.
    """
    try:
        table = pq.read_table(pa.BufferReader(read_regular(path)))
        if incomplete := [name for name in table.column_names if table[name].null_count]:
            raise ValueError(f"its column {incomplete[0]} has gaps")
        verdicts = {name: table[name].to_numpy() for name in table.column_names}
        kinds = {name: column.dtype.kind for name, column in verdicts.items()}
        if missing := [name for name in (*REQUIRED, *measured) if name not in kinds]:
            raise ValueError(f"it has no usable column {missing[0]}")
        if other := [name for name, kind in kinds.items() if kind not in KINDS_OF.get(name, ANY)]:
            raise ValueError(f"its column {other[0]} does not hold the numbers that it should")
        if not len(verdicts["sample_id"]) or len(np.unique(verdicts["sample_id"])) < len(verdicts["sample_id"]):
            raise ValueError("it is empty, or has an image twice")
    except FileNotFoundError:
        raise ValueError(f"{path}, the verdicts of an evaluation, does not exist; {AGAIN}") from None
    except OSError as error:  # pyarrow's errors are OSError too
        raise ValueError(f"{path} cannot be read: {error.strerror or error}; {AGAIN}") from None
    except (ValueError, pa.ArrowException) as error:
        raise ValueError(f"{path} is damaged: {' '.join(str(error).split())}; {AGAIN}") from None
    return verdicts
