"""Loads exact batches from an FFCV file, and raises an error where it would otherwise hang or return garbage.

The file format and the decoder are FFCV's; its `Loader` is not used, as it recompiles for every loader, leaks its
thread on an early exit and hangs on an error. Here each thread decodes one contiguous part of a batch (see `decoder`);
the plan (see `sampling`) says which images and which crops.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import pairwise, repeat
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.data.loading.decoder import REASONS, compiled_decoder, decode_part, decode_uncompiled
from pipeline.data.loading.prefetch import LoaderError, Prefetch
from pipeline.data.manifest import REWRITE, DataError, Manifest, check_structure, open_checked, read_index
from pipeline.distributed import to_device

READ_DEADLINE_S = 120.0
NAMED_IDS = 10


class CorruptSample(DataError):
    """Images that do not exist or are damaged; the message names the file and the sample ids."""


@dataclass(frozen=True)
class Batch:
    """images uint8 [n, 3, s, s] (channels_last), labels int64 [n], ids int64 [n]; the batch owns their memory."""

    images: torch.Tensor
    labels: torch.Tensor
    ids: torch.Tensor

    def to(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Images float32 [n, 3, s, s] in [0, 1] and labels on a device, through page-locked memory if that is a GPU."""
        return to_device(self.images, device).float().div(255.0), to_device(self.labels, device)


@dataclass(frozen=True)
class PendingBatch:
    """A batch that threads are reading."""

    ids: NDArray[np.int64]
    images: NDArray[np.uint8]
    status: NDArray[np.int32]
    parts: list[Future[None]]


class Loader:
    """An FFCV file with its manifest, read by `threads` threads into images of image_size x image_size pixels.

    Attributes: `num_samples`, the data set's own images; `num_extra`, the extra ones, whose ids follow; `class_names`;
    `identity`, a digest of the data; and `labels`, `heights`, `widths` int64 [num_samples + num_extra]. A context
    manager; the first loader in a process takes seconds longer, as it compiles the decoder. With `compiled=False` it
    does not, and reads the same pixels, a few images at a time.

    Errors: DataError for a file that `open_checked` refuses.
    """

    def __init__(
        self, path: str | Path, *, image_size: int, threads: int, ahead: int = 4, compiled: bool = True
    ) -> None:
        self.path = Path(path)
        manifest = open_checked(self.path)
        self.num_samples = manifest.num_samples - manifest.num_extra
        self.num_extra = manifest.num_extra
        self.class_names = manifest.class_names
        self.identity = {"data_sha256": manifest.sha256}
        self.image_size = image_size
        self._threads = threads
        self._ahead = ahead
        self._table, self.labels = _read_columns(self.path, manifest)
        self.heights, self.widths = self._table[:, 1], self._table[:, 2]
        self._decoder = compiled_decoder() if compiled else decode_uncompiled
        self._file = self.path.open("rb")
        self._closed = False
        # Threads live as long as the loader: FFCV keeps a turbojpeg handle per thread and never frees it.
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")
        self._prefetches: set[Prefetch[Batch]] = set()

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop every thread and close the file. Closing twice is allowed."""
        self._closed = True
        stopped = [prefetch.stop() for prefetch in list(self._prefetches)]
        self._pool.shutdown(wait=all(stopped), cancel_futures=True)
        if all(stopped):  # a stuck thread may still read
            self._file.close()

    def read(self, ids: NDArray[np.int64], crops: NDArray[np.int32], image_size: int | None = None) -> Batch:
        """Decode images `ids` [n] with `crops` [n, 5] (see `sampling`) to `image_size`, by default the loader's.

        A crop of that size is copied and may extend beyond the image, where it is zero; any other crop is resized as by
        OpenCV's INTER_AREA.

        Errors: CorruptSample; ValueError for a resized crop that extends beyond its image; LoaderError if the disk
        fails.
        """
        return self._collect(self._submit(ids, crops, image_size))

    def _submit(self, ids: NDArray[np.int64], crops: NDArray[np.int32], image_size: int | None) -> PendingBatch:
        if self._closed:
            raise LoaderError(f"{self.path}: the loader is closed")
        ids = np.array(ids, np.int64)
        crops = np.ascontiguousarray(crops, np.int32)
        outside = (ids < 0) | (ids >= len(self._table))
        if outside.any():
            raise CorruptSample(
                f"{self.path}: no sample {_first_ids(ids[outside])}; its {len(self._table)} samples are numbered from 0"
            )
        table = self._table[ids]
        size = self.image_size if image_size is None else image_size
        self._check_crops(ids, crops, table, size)

        images = np.empty((len(ids), size, size, 3), np.uint8)
        status = np.zeros(len(ids), np.int32)
        edges = [len(ids) * part // self._threads for part in range(self._threads + 1)]
        parts = [slice(begin, end) for begin, end in pairwise(edges) if begin < end]
        futures = [
            self._pool.submit(decode_part, self._decoder, self._file, table[p], crops[p], images[p], status[p])
            for p in parts
        ]
        return PendingBatch(ids, images, status, futures)

    def _collect(self, pending: PendingBatch) -> Batch:
        ids, status = pending.ids, pending.status
        if wait(pending.parts, timeout=READ_DEADLINE_S).not_done:
            raise LoaderError(f"{self.path}: {len(ids)} images were not read within {READ_DEADLINE_S:g} s")
        try:
            for part in pending.parts:
                part.result()
        except OSError as error:
            raise LoaderError(f"{self.path}: cannot be read: {error}") from error
        if status.any():
            damage = [f"sample {_first_ids(ids[status == c])}: {REASONS[c]}" for c in REASONS if c in status]
            raise CorruptSample(
                f"{self.path}: {'; '.join(damage)}; `python -m launch data verify` lists all; {REWRITE}"
            )
        return Batch(
            images=torch.from_numpy(pending.images).permute(0, 3, 1, 2),
            labels=torch.from_numpy(self.labels[ids]),
            ids=torch.from_numpy(ids),
        )

    def _check_crops(
        self, ids: NDArray[np.int64], crops: NDArray[np.int32], table: NDArray[np.int64], size: int
    ) -> None:
        if crops.shape != (len(ids), 5):
            raise ValueError(f"crops have shape {list(crops.shape)}, expected [{len(ids)}, 5] for {len(ids)} ids")
        top, left, height, width, _ = crops.T.astype(np.int64)
        fits = (top >= 0) & (left >= 0) & (height > 0) & (width > 0)
        fits &= (top + height <= table[:, 1]) & (left + width <= table[:, 2])
        fits |= (height == size) & (width == size)
        if not fits.all():
            first = int(np.argmin(fits))
            raise ValueError(
                f"{self.path}: crop {crops[first, :4].tolist()} leaves sample {ids[first]} of "
                f"{table[first, 1]} x {table[first, 2]} pixels; only crops of {size} x {size} may extend beyond it"
            )

    def batches(
        self,
        plan: Iterable[tuple[NDArray[np.int64], NDArray[np.int32]]],
        sizes: Iterable[int] | None = None,
        deadline_s: float = 120.0,
    ) -> Generator[Batch]:
        """Yield a plan's batches in order, reading at most `ahead` of them before they are needed.

        `sizes` gives each batch's image size, by default the loader's; another size needs no recompilation.

        Leaving the iteration early stops its thread.

        Errors: those of `read` and of the plan itself, at the batch that caused them; LoaderError if a batch takes
        longer than `deadline_s` seconds or the loader is closed.
        """
        planned = zip(plan, repeat(None) if sizes is None else sizes, strict=False)
        prefetch = Prefetch(self._read_plan(planned), self._ahead, str(self.path))
        self._prefetches.add(prefetch)
        try:
            while (batch := prefetch.next(deadline_s)) is not None:
                yield batch
        finally:
            prefetch.stop()
            self._prefetches.discard(prefetch)

    def _read_plan(
        self, planned: Iterable[tuple[tuple[NDArray[np.int64], NDArray[np.int32]], int | None]]
    ) -> Generator[Batch]:
        """Submits each batch before the previous one is complete: as images take unequally long, threads would idle."""
        previous: PendingBatch | None = None
        remaining = iter(planned)
        while True:
            try:
                (ids, crops), size = next(remaining)
                pending = self._submit(ids, crops, size)
            except StopIteration:
                break
            except Exception:
                if previous is not None:
                    yield self._collect(previous)
                raise
            if previous is not None:
                yield self._collect(previous)
            previous = pending
        if previous is not None:
            yield self._collect(previous)


def _first_ids(ids: NDArray[np.int64]) -> str:
    more = f" and {len(ids) - NAMED_IDS} more" if len(ids) > NAMED_IDS else ""
    return ", ".join(str(i) for i in ids[:NAMED_IDS]) + more


def _read_columns(path: Path, manifest: Manifest) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The table int64 [n, 6] (mode, height, width, offset, bytes, CRC-32) of a file's images, and labels int64 [n]."""
    index = read_index(path, check_structure(path))
    samples = index.samples
    columns = [samples[name] for name in ("mode", "height", "width", "data_ptr")]
    columns += [index.sizes, manifest.crc32_of_samples()]
    return np.stack([column.astype(np.int64) for column in columns], axis=1), samples["label"].astype(np.int64)
