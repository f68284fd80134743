"""One verdict per image, whatever the number of workers and however often an evaluation is interrupted.

Images go through in fixed chunks of file order, dealt to the workers there are. With a store, a finished chunk is a
file, and an evaluation that was stopped or killed goes on with the next one. A chunk may then take hours: whoever is
done waits for the others' files instead of in a collective, whose deadline is for workers that hang.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from torch import nn

from pipeline.data.loading.image_list import ListedImages
from pipeline.data.loading.loader import Batch, Loader
from pipeline.distributed import Group
from pipeline.evaluation.measures.base import Measure, Verdicts
from pipeline.robustness.attacks import crafting
from pipeline.run.files import atomic_write_json, naming, read_json
from pipeline.run.stop import StopRequested

Crops = Callable[[NDArray[np.int64]], NDArray[np.int32]]
Images = Loader | ListedImages
"""What can be judged: both have num_samples, identity and batches."""
WAIT_S = 0.2
"""How often a worker that is done looks for the others' chunks."""


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
        """Tell who waits that not all chunks will come."""
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


def _going_on(done: int, total: int) -> bool:
    return False


def _unasked() -> bool:
    return False


def _judge(network: nn.Module, batch: Batch, measure: Measure, group: Group) -> Verdicts:
    ids, labels = batch.ids.numpy(), batch.labels
    images = batch.images.to(group.device).float().div(255.0)
    columns = measure.judge(network, images, labels.to(group.device), ids)
    return {"sample_id": ids, "label": labels.numpy(), **{name: c.cpu().numpy() for name, c in columns.items()}}


class _GivenUp(Exception):
    """The chunk under way is not finished."""


@contextmanager
def _before_each_pass(network: nn.Module, call: Callable[..., None]) -> Iterator[None]:
    hook = network.register_forward_pre_hook(call)
    try:
        yield
    finally:
        hook.remove()


def evaluate(
    network: nn.Module,
    loader: Images,
    ids: NDArray[np.int64],
    crops: Crops,
    measure: Measure,
    chunk: int,
    group: Group,
    on_chunk: Callable[[int, int], bool] = _going_on,
    store: ChunkStore | None = None,
    on_pass: Callable[[], bool] = _unasked,
) -> Verdicts:
    """Verdicts for the samples `ids`, sorted by id, on every rank.

    Chunks are cut in the order of `ids`; `on_chunk(done, total)` reports this rank's and says whether to stop, which
    raises StopRequested on every rank. `on_pass()` is called whenever images go through the network, and while this
    rank waits; if it says so, the chunk under way is given up at once. The network is put in eval mode and restored;
    its parameters are not touched. Collective.
    """
    chunks = [ids[start : start + chunk] for start in range(0, len(ids), chunk)]
    kept = group.broadcast(store.open() if store is not None and group.is_first else {})
    left = [index for index in range(len(chunks)) if index not in kept]
    mine = left[group.rank :: group.world]

    def plan() -> Iterator[tuple[NDArray[np.int64], NDArray[np.int32]]]:
        for index in mine:
            yield chunks[index], crops(chunks[index])

    parts: list[Verdicts] = []

    def pulse(*_: object) -> None:
        if on_pass():
            raise _GivenUp

    with crafting(network), _before_each_pass(network, pulse), suppress(_GivenUp):
        for index, batch in zip(mine, loader.batches(plan()), strict=False):
            parts.append(_judge(network, batch, measure, group))
            if store is not None:
                store.put(index, parts[-1])
            if on_chunk(len(parts), len(mine)):
                break
    stopped = len(parts) < len(mine)
    if store is not None and group.world > 1:
        if stopped:
            store.stop()
        store.wait(len(chunks), on_pass)
    answers = group.gather((parts, stopped))
    if any(stopped for _, stopped in answers):
        raise StopRequested("asked to stop amid an evaluation, which goes on with the next chunk on resume")
    gathered = [*kept.values(), *(part for rank_parts, _ in answers for part in rank_parts)]
    if not gathered:
        raise ValueError("there is no image to evaluate")
    joined = {name: np.concatenate([part[name] for part in gathered]) for name in gathered[0]}
    order = np.argsort(joined["sample_id"], kind="stable")
    verdicts = {name: column[order] for name, column in joined.items()}
    if not np.array_equal(verdicts["sample_id"], np.sort(ids)):
        raise RuntimeError("evaluation did not judge every image exactly once")
    return verdicts
