"""Verifies every stored image of an FFCV file: after writing, and for `launch data verify`.

Uses threads, not processes: reading, hashing and libjpeg-turbo all run without the GIL.
"""

from __future__ import annotations

import base64
import hashlib
import os
import struct
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.data.manifest import (
    HASH_PAGE_BYTES,
    MODE_JPEG,
    MODE_RAW,
    SampleIndex,
    check_structure,
    open_checked,
    read_index,
)
from pipeline.data.sources.decode import jpeg_fault

CHUNK = 64
"""Images per task of a thread."""

ProgressCallback = Callable[[str, int, int], None]
"""Called with (stage, done, total)."""


@dataclass(frozen=True)
class SampleCheck:
    """The result of reading all samples, by sample id."""

    crc32: NDArray[np.uint32]
    content_sha256: str
    faults: dict[int, str]
    """Reason by id of a damaged sample; empty for an intact file."""

    @property
    def crc32_base64(self) -> str:
        """The manifest's `sample_crc32`."""
        return base64.b64encode(self.crc32.astype("<u4").tobytes()).decode()


@dataclass(frozen=True)
class Verification:
    """Damage to a file; all fields are empty for an intact one."""

    samples: dict[int, str]
    """Reason by sample id."""
    pages: list[int]
    """Numbers of the 8 MiB pages that have changed since they were written, whether they hold images or not."""
    manifest: list[str]
    """Names of wrong hashes in the manifest, if the manifest is damaged and the file is intact."""

    @property
    def damaged(self) -> bool:
        return bool(self.samples or self.pages or self.manifest)


def available_cores() -> int:
    """Number of cores that this process may use; a cluster's scheduler often limits it."""
    return len(os.sched_getaffinity(0))


@contextmanager
def thread_pool(count: int) -> Iterator[ThreadPoolExecutor]:
    """A pool of `count` threads that cancels its pending tasks when the block raises."""
    pool = ThreadPoolExecutor(count)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def check_samples(
    path: str | Path,
    index: SampleIndex,
    progress: ProgressCallback,
    expected: Callable[[int], bytes] | None = None,
) -> SampleCheck:
    """Read, hash and decode every sample. If `expected` is given, raw samples must equal expected(id) exactly."""
    descriptor = os.open(path, os.O_RDONLY)
    count = len(index.samples)
    crc32 = np.zeros(count, np.uint32)
    digests = np.zeros((count, 16), np.uint8)
    faults: dict[int, str] = {}

    def check_chunk(start: int) -> int:
        stop = min(start + CHUNK, count)
        for i in range(start, stop):
            mode, width, height, ptr, label = index.samples[i].item()
            data = os.pread(descriptor, int(index.sizes[i]), ptr)
            crc32[i] = zlib.crc32(data)
            digest = hashlib.blake2b(struct.pack("<qBHH", label, mode, height, width) + data, digest_size=16)
            digests[i] = np.frombuffer(digest.digest(), np.uint8)
            fault = _stored_fault(data, mode, height, width)
            if fault is None and mode == MODE_RAW and expected is not None and data != expected(i):
                fault = "its pixels differ from the source's"
            if fault is not None:
                faults[i] = fault
        return stop

    progress("check", 0, count)
    try:
        with thread_pool(available_cores()) as pool:
            for stop in pool.map(check_chunk, range(0, count, CHUNK)):
                progress("check", stop, count)
    finally:
        os.close(descriptor)
    rows = digests[np.lexsort(digests.T[::-1])]
    return SampleCheck(crc32, hashlib.sha256(rows.tobytes()).hexdigest(), dict(sorted(faults.items())))


def _stored_fault(data: bytes, mode: int, height: int, width: int) -> str | None:
    if mode == MODE_JPEG:
        return jpeg_fault(np.frombuffer(data, np.uint8), height, width)
    if mode != MODE_RAW:
        return f"its storage mode {mode} does not exist"
    if len(data) != height * width * 3:
        return f"it has {len(data)} bytes where {height} x {width} raw pixels are recorded"
    return None


def page_hashes(path: str | Path) -> Iterator[tuple[bytes, str]]:
    """Yield (bytes, BLAKE2b-128) of every 8 MiB of a file, in order."""
    with Path(path).open("rb") as stream:
        while page := stream.read(HASH_PAGE_BYTES):
            yield page, hashlib.blake2b(page, digest_size=16).hexdigest()


def hash_file(path: str | Path, progress: ProgressCallback) -> tuple[str, list[str]]:
    """SHA-256 of the whole file and the hash of each 8 MiB page."""
    total = -(-Path(path).stat().st_size // HASH_PAGE_BYTES)
    whole = hashlib.sha256()
    pages: list[str] = []
    progress("hash", 0, total)
    for page, digest in page_hashes(path):
        whole.update(page)
        pages.append(digest)
        progress("hash", len(pages), total)
    return whole.hexdigest(), pages


def verify_file(path: str | Path, progress: ProgressCallback) -> Verification:
    """Compare every byte of a file with its manifest and decode every image.

    Errors: DataError if the file does not pass `manifest.open_checked`.
    """
    manifest = open_checked(path)
    check = check_samples(path, read_index(path, check_structure(path)), progress)
    samples = dict(check.faults)
    for i in np.flatnonzero(check.crc32 != manifest.crc32_of_samples()).tolist():
        samples.setdefault(i, "its bytes differ from those written")
    whole, hashes = hash_file(path, progress)
    pages = [number for number, pair in enumerate(zip(hashes, manifest.pages, strict=True)) if pair[0] != pair[1]]
    wrong = [("sha256", whole != manifest.sha256 and not pages)]
    wrong.append(("content_sha256", check.content_sha256 != manifest.content_sha256 and not samples))
    return Verification(dict(sorted(samples.items())), pages, [name for name, is_wrong in wrong if is_wrong])
