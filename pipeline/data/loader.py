"""Batches from an FFCV file: exact, owned, and an error instead of a hang or garbage. The door to FFCV's compiled code.

The file format and the decoder are FFCV's; its `Loader` is not used, as it compiles anew for every loader, leaks its
thread on an early exit and hangs on an error. Here one numba kernel, compiled once per process, decodes the contiguous
part of a batch that one Python thread was given; the plan (see `order`) says which images and which crops.

Stored bytes are read with pread into memory of our own, as a mapped file that is cut while in use, or whose disk fails,
ends the process with SIGBUS. Each image is compared with the manifest's checksum before it is decoded: libjpeg-turbo
alone accepts many a damaged JPEG, and raw pixels have nothing that could look wrong.
"""

from __future__ import annotations

import functools
import os
import zlib
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from importlib import import_module
from itertools import pairwise, repeat
from pathlib import Path
from typing import Any, BinaryIO

import numba
import numba.typed
import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.data.manifest import (
    MODE_JPEG,
    MODE_RAW,
    REWRITE,
    DataError,
    Manifest,
    check_structure,
    open_checked,
    read_index,
)
from pipeline.data.prefetch import LoaderError, Prefetch

# Importing ffcv compiles a numba dict of two constants, which takes seconds and is not needed here, and sets torch to
# one thread. `numba.typed` comes first, so that nothing but ffcv's own modules sees compilation switched off.
_numba_config: Any = import_module("numba.core.config")
_torch_threads, _disable_jit = torch.get_num_threads(), _numba_config.DISABLE_JIT
_numba_config.DISABLE_JIT = True
import ffcv.libffcv as libffcv  # noqa: E402

_numba_config.DISABLE_JIT = _disable_jit
torch.set_num_threads(_torch_threads)

READ_DEADLINE_S = 120.0
CUT, CHECKSUM, UNDECODABLE = 1, 2, 3
REASONS = {
    CUT: "the file ends before its data",
    CHECKSUM: "stored bytes differ from the manifest's checksum",
    UNDECODABLE: "cannot be decoded",
}
NAMED_IDS = 10


class CorruptSample(DataError):
    """Images that are not there or cannot be read; the message names the file and the sample ids."""


@dataclass(frozen=True)
class Batch:
    """Owned memory: images uint8 [n, 3, s, s] (channels_last), labels int64 [n], ids int64 [n]."""

    images: torch.Tensor
    labels: torch.Tensor
    ids: torch.Tensor


class Loader:
    """An FFCV file with its manifest, read by `threads` threads of its own into images of `image_size` squared.

    Has `num_samples`, the images of the data set; `num_extra`, the extra ones, whose ids follow; `class_names`;
    `identity`, what tells its images from all others; and `labels`, `heights`, `widths` int64 [num_samples +
    num_extra]. A context manager; the first one in a process takes seconds longer (the kernel's compilation).

    Errors: DataError for a file that `open_checked` refuses.
    """

    def __init__(self, path: str | Path, *, image_size: int, threads: int, ahead: int = 4) -> None:
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
        self._kernel = _compiled_kernel()
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
        """Stop every thread and close the file. Closing twice is fine."""
        self._closed = True
        ended = [prefetch.stop() for prefetch in list(self._prefetches)]
        self._pool.shutdown(wait=all(ended), cancel_futures=True)
        if all(ended):  # a thread that is stuck still reads
            self._file.close()

    def read(self, ids: NDArray[np.int64], crops: NDArray[np.int32], image_size: int | None = None) -> Batch:
        """Decode images `ids` [n] with `crops` [n, 5] (see `order`), now, to the loader's size or another.

        A crop of that size is copied, and may reach outside the image, where it is zero; any other is resized with
        OpenCV's INTER_AREA.

        Errors: CorruptSample; ValueError for a resized crop that leaves its image; LoaderError if the disk fails.
        """
        if self._closed:
            raise LoaderError(f"{self.path}: the loader is closed")
        ids = np.array(ids, np.int64)
        crops = np.ascontiguousarray(crops, np.int32)
        outside = (ids < 0) | (ids >= len(self._table))
        if outside.any():
            raise CorruptSample(
                f"{self.path}: no sample {_some(ids[outside])}; its {len(self._table)} samples count from 0"
            )
        table = self._table[ids]
        size = self.image_size if image_size is None else image_size
        self._check_crops(ids, crops, table, size)

        images = np.empty((len(ids), size, size, 3), np.uint8)
        status = np.zeros(len(ids), np.int32)
        edges = [len(ids) * part // self._threads for part in range(self._threads + 1)]
        parts = [slice(begin, end) for begin, end in pairwise(edges) if begin < end]
        futures = [
            self._pool.submit(_decode_part, self._kernel, self._file, table[p], crops[p], images[p], status[p])
            for p in parts
        ]
        if wait(futures, timeout=READ_DEADLINE_S).not_done:
            raise LoaderError(f"{self.path}: {len(ids)} images were not read within {READ_DEADLINE_S:g} s")
        try:
            for future in futures:
                future.result()
        except OSError as error:
            raise LoaderError(f"{self.path}: cannot be read: {error}") from error
        if status.any():
            found = [f"sample {_some(ids[status == code])}: {REASONS[code]}" for code in REASONS if code in status]
            raise CorruptSample(f"{self.path}: {'; '.join(found)}; `python -m launch data verify` lists all; {REWRITE}")
        return Batch(
            images=torch.from_numpy(images).permute(0, 3, 1, 2),
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
                f"{table[first, 1]} x {table[first, 2]} pixels; only crops of {size} x {size} may"
            )

    def batches(
        self,
        plan: Iterable[tuple[NDArray[np.int64], NDArray[np.int32]]],
        sizes: Iterable[int] | None = None,
        deadline_s: float = 120.0,
    ) -> Generator[Batch]:
        """Read a plan's batches ahead of their use, in its order; at most `ahead` wait.

        `sizes` has each batch's image size where it is not the loader's; nothing is compiled anew for another.

        Leaving the iteration early stops its thread.

        Errors: those of `read` and of the plan itself, at the batch where they happened; LoaderError if a batch takes
        longer than `deadline_s` seconds or the loader is closed.
        """
        planned = zip(plan, repeat(None) if sizes is None else sizes, strict=False)
        prefetch = Prefetch((self.read(*batch, size) for batch, size in planned), self._ahead, str(self.path))
        self._prefetches.add(prefetch)
        try:
            while (batch := prefetch.next(deadline_s)) is not None:
                yield batch
        finally:
            prefetch.stop()
            self._prefetches.discard(prefetch)


def _some(ids: NDArray[np.int64]) -> str:
    more = f" and {len(ids) - NAMED_IDS} more" if len(ids) > NAMED_IDS else ""
    return ", ".join(str(i) for i in ids[:NAMED_IDS]) + more


def _read_columns(path: Path, manifest: Manifest) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The table int64 [n, 6] (mode, height, width, first byte, bytes, CRC-32) of a file's images; labels int64 [n]."""
    index = read_index(path, check_structure(path))
    samples = index.samples
    columns = [samples[name] for name in ("mode", "height", "width", "data_ptr")]
    columns += [index.sizes, manifest.crc32_of_samples()]
    return np.stack([column.astype(np.int64) for column in columns], axis=1), samples["label"].astype(np.int64)


def _decode_part(
    kernel: Callable[..., None],
    file: BinaryIO,
    table: NDArray[np.int64],
    crops: NDArray[np.int32],
    images: NDArray[np.uint8],
    status: NDArray[np.int32],
) -> None:
    """Read and decode a part of a batch, whose rows are all given, into images and status."""
    ends = np.cumsum(table[:, 4])
    data = np.empty(int(ends[-1]), np.uint8)
    for n, (place, size, checksum) in enumerate(table[:, 3:].tolist()):
        stored = data.data[int(ends[n]) - size : int(ends[n])]
        if os.preadv(file.fileno(), [stored], place) < size:
            status[n] = CUT
        elif zlib.crc32(stored) != checksum:
            status[n] = CHECKSUM
    pixels = (table[:, 1] * table[:, 2])[table[:, 0] == MODE_JPEG]
    kernel(data, table, crops, np.empty(3 * pixels.max(initial=0), np.uint8), images, status)


@functools.cache
def _compiled_kernel() -> Callable[..., None]:
    """The decoder as machine code that runs without the interpreter's lock; shared by every loader of the process."""
    imdecode, resize, copy = libffcv.ctypes_imdecode, libffcv.ctypes_resize, libffcv.ctypes_memcopy

    @numba.njit(
        numba.void(
            numba.uint8[::1],
            numba.int64[:, ::1],
            numba.int32[:, ::1],
            numba.uint8[::1],
            numba.uint8[:, :, :, ::1],
            numba.int32[::1],
        ),
        nogil=True,
    )
    def decode(data, table, crops, scratch, images, status):
        side = images.shape[1]
        end = np.int64(data.ctypes.data)
        for n in range(len(table)):
            mode, height, width, _, size, _ = table[n]
            source, end = end, end + size
            if status[n] != 0:
                continue
            if mode == MODE_JPEG:
                decoded = np.int64(scratch.ctypes.data)
                if imdecode(source, size, height, width, decoded, height, width, 0, 0, 1, 1, False, False) != 0:
                    status[n] = UNDECODABLE
                    continue
                source = decoded
            elif mode != MODE_RAW or size != height * width * 3:
                status[n] = UNDECODABLE
                continue

            top, left, crop_height, crop_width, flip = crops[n]
            image = images[n]
            target = np.int64(image.ctypes.data)
            if crop_height == side and crop_width == side:
                first, last = max(-left, 0), min(side, width - left)
                for row in range(side):
                    if 0 <= top + row < height and first < last:
                        image[row, :first] = 0
                        offset = ((top + row) * width + left + first) * 3
                        copy(source + offset, target + (row * side + first) * 3, (last - first) * 3)
                        image[row, last:] = 0
                    else:
                        image[row] = 0
            else:
                bottom, right = top + crop_height, left + crop_width
                resize(0, source, height, width, top, bottom, left, right, target, side, side)
            if flip:
                for row in range(side):
                    for column in range(side // 2):
                        for channel in range(3):
                            mirrored = image[row, side - 1 - column, channel]
                            image[row, side - 1 - column, channel] = image[row, column, channel]
                            image[row, column, channel] = mirrored

    return decode
