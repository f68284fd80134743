"""Copies an FFCV file page by page, comparing each page with the manifest's hash before writing it."""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path

from pipeline.data.manifest import HASH_PAGE_BYTES, DataError, Manifest
from pipeline.data.writing.verify import thread_pool
from pipeline.run.disk import readable

log = logging.getLogger(__name__)

LOG_EVERY_S = 10.0
"""How often a long copy is logged."""
THREADS = 4
"""Pages copied at a time: a file server serves several readers faster than one, and hashing needs the cores."""
FLUSH_PAGES = 64
"""Half a gigabyte. A single flush at the end would be minutes without progress."""


def copy_verified(path: Path, manifest: Manifest, target: Path, on_progress: Callable[[int], None]) -> None:
    """Make `target`, which must not exist, an exact copy of FFCV file `path`, and flush it to disk.

    `on_progress` is called with the bytes copied so far; raising cancels the copy. The page cache keeps the copy and
    drops the original, as only the copy will be read.

    Errors: DataError, naming the original, if a page differs from its manifest; OSError.
    """
    size, done, start = manifest.file_size, 0, time.monotonic()
    last_log = start
    mode = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    with path.open("rb") as source, open(os.open(target, mode, 0o600), "wb") as copy, thread_pool(THREADS) as pool:

        def copy_page(number: int) -> int:
            offset = number * HASH_PAGE_BYTES
            page = _read_page(source.fileno(), min(HASH_PAGE_BYTES, size - offset), offset)
            if hashlib.blake2b(page, digest_size=16).hexdigest() != manifest.pages[number]:
                raise DataError(
                    f"{path} is damaged: its 8 MiB page {number} differs from its manifest; "
                    f"`python -m launch data verify {path}` lists the damaged images"
                )
            _write_page(copy.fileno(), page, offset)
            os.posix_fadvise(source.fileno(), offset, len(page), os.POSIX_FADV_DONTNEED)
            return len(page)

        on_progress(0)
        for number, copied in enumerate(pool.map(copy_page, range(len(manifest.pages))), start=1):
            done += copied
            on_progress(done)
            if number % FLUSH_PAGES == 0:
                os.fdatasync(copy.fileno())
            now = time.monotonic()
            if now - last_log > LOG_EVERY_S:
                last_log = now
                rate = readable(done / (now - start))
                log.info("copying %s: %s of %s, %s/s", path, readable(done), readable(size), rate)
        os.fsync(copy.fileno())
    log.info("copied %s to %s: %s in %.1f s", path, target.parent, readable(size), time.monotonic() - start)


def _read_page(descriptor: int, size: int, offset: int) -> bytes:
    page = os.pread(descriptor, size, offset)
    while len(page) < size and (more := os.pread(descriptor, size - len(page), offset + len(page))):
        page += more
    return page


def _write_page(descriptor: int, page: bytes, offset: int) -> None:
    rest = memoryview(page)
    while rest:
        count = os.pwrite(descriptor, rest, offset)
        rest, offset = rest[count:], offset + count
