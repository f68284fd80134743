"""Copying an FFCV file page by page, each page compared with the manifest's hash before it is written."""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path

from pipeline.data.manifest import HASH_PAGE_BYTES, DataError, Manifest
from pipeline.data.writing.verify import thread_count
from pipeline.run.disk import readable

log = logging.getLogger(__name__)

TELL_S = 10.0
"""How often a long copy is logged."""
COPIERS = 4
"""Pages under way at a time: a file server gives several readers more than one, and hashing needs the cores."""
FLUSH_PAGES = 64
"""Half a gigabyte. A flush of everything at the end would be minutes without progress."""


def copy_verified(path: Path, manifest: Manifest, target: Path, progressed: Callable[[int], None]) -> None:
    """Make `target`, which must not exist, an exact copy of FFCV file `path`, and flush it to disk.

    `progressed` is called with the bytes copied so far; if it raises, the copying ends. The kernel keeps the copy in
    memory, and is told to forget the original: what is read next is the copy.

    Errors: DataError, naming the original, if a page is not what its manifest says; OSError.
    """
    size, done, begun = manifest.file_size, 0, time.monotonic()
    told = begun
    mode = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    with path.open("rb") as source, open(os.open(target, mode, 0o600), "wb") as copy, thread_count(COPIERS) as pool:

        def copy_page(number: int) -> int:
            offset = number * HASH_PAGE_BYTES
            page = _read(source.fileno(), min(HASH_PAGE_BYTES, size - offset), offset)
            if hashlib.blake2b(page, digest_size=16).hexdigest() != manifest.pages[number]:
                raise DataError(
                    f"{path} is damaged: its 8 MiB page {number} is not what its manifest says; "
                    f"`python -m launch data verify {path}` lists what is lost"
                )
            _write(copy.fileno(), page, offset)
            os.posix_fadvise(source.fileno(), offset, len(page), os.POSIX_FADV_DONTNEED)
            return len(page)

        progressed(0)
        for number, copied in enumerate(pool.map(copy_page, range(len(manifest.pages))), start=1):
            done += copied
            progressed(done)
            if number % FLUSH_PAGES == 0:
                os.fdatasync(copy.fileno())
            now = time.monotonic()
            if now - told > TELL_S:
                told = now
                rate = readable(done / (now - begun))
                log.info("copying %s: %s of %s, %s/s", path, readable(done), readable(size), rate)
        os.fsync(copy.fileno())
    log.info("copied %s to %s: %s in %.1f s", path, target.parent, readable(size), time.monotonic() - begun)


def _read(descriptor: int, size: int, offset: int) -> bytes:
    page = os.pread(descriptor, size, offset)
    while len(page) < size and (more := os.pread(descriptor, size - len(page), offset + len(page))):
        page += more
    return page


def _write(descriptor: int, page: bytes, offset: int) -> None:
    left = memoryview(page)
    while left:
        written = os.pwrite(descriptor, left, offset)
        left, offset = left[written:], offset + written
