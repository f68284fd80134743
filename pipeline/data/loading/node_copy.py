"""Copies of FFCV files on a node's own disk, which workers read instead of the original on a file server.

    <stage_to>/hydra-<uid>/train-0123456789abcdef.beton   + its manifest, and `lock`

The name contains the manifest's SHA-256, so that different files never share a copy and the next job finds it again.
The folder belongs to one user alone. One process per node copies while the others wait. Copying fills the page cache; a
copy that is reused is read ahead into it.

What is verified: each page while it is copied, by the manifest's hash; when a copy is reused, its size, its index and
that its manifest equals the original's. Its images are not read again: for a large file that would add minutes to every
start, and the loader compares each image with its checksum before decoding it anyway. A copy found damaged there is
removed, and the next start creates it again.
"""

from __future__ import annotations

import logging
import os
import platform
import stat
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.data.loading.copy_file import copy_verified
from pipeline.data.loading.loader import Batch, CorruptSample, Loader, PendingBatch
from pipeline.data.loading.prefetch import LoaderError
from pipeline.data.manifest import DataError, Manifest, manifest_path, open_checked
from pipeline.run.disk import FULL, free_bytes, readable
from pipeline.run.files import atomic_write_text, fsync_folder
from pipeline.run.locks import try_lock

log = logging.getLogger(__name__)

STALL_S = 120.0
"""Waiting processes give up after the copying one has made no progress for so long."""
POLL_S = 0.25
"""How often waiting processes try the lock."""
LOG_EVERY_S = 10.0
"""How often a long wait is logged."""
MARGIN_BYTES = 64 << 20
READ_AHEAD_BYTES = 128 << 10
"""How much is read ahead at a time: Linux ignores what exceeds a device's own limit, which is rarely less."""


class NodeCopyFailed(RuntimeError):
    """An intact file was not copied: a disk or a file server fails, or the process that copies it hangs."""


StatusCallback = Callable[[str], None]
"""Called repeatedly with a line that says which process copies, and how far it is. An unchanged line means no progress;
raising cancels the copy."""


def copy_to_node(path: Path, folder: Path, on_status: StatusCallback = lambda status: None) -> Path:
    """The copy of FFCV file `path` below `folder`; creates it if there is none.

    Errors: DataError, naming the original, for a file that is damaged or does not fit on the disk, and for a folder
    that is not this user's. NodeCopyFailed if another try may succeed.
    """
    manifest, private = open_checked(path), _private_folder(folder)
    copy = private / f"{path.stem}-{manifest.sha256[:16]}{path.suffix}"
    try:
        with _copy_lock(private, on_status) as lock:
            for leftover in (*private.glob(f"*.{platform.node()}.*.tmp"), *private.glob(".*.manifest.json.*.tmp")):
                leftover.unlink()  # its process has died: this one holds the lock
            if _is_usable(copy, manifest):
                log.info("%s: using its copy %s", path, copy)
                size = manifest.file_size
                _read_ahead(
                    copy, lambda done: on_status(_write_status(lock, f"reading {copy}: {done} of {size} bytes"))
                )
            else:
                delete_copy(copy)
                _create_copy(path, manifest, copy, lock, on_status)
    except OSError as error:
        if error.errno in FULL:
            raise DataError(_no_space_message(path, private, manifest.file_size)) from None
        raise NodeCopyFailed(f"{path} was not copied to {private} on {platform.node()}: {error}") from error
    return copy


def _create_copy(path: Path, manifest: Manifest, copy: Path, lock: int, on_status: StatusCallback) -> None:
    """Copy under a temporary name; the manifest is written last, and without it a copy does not count."""

    def on_progress(done: int) -> None:
        on_status(_write_status(lock, f"copying {path}: {done} of {manifest.file_size} bytes"))

    free = free_bytes(copy.parent)
    if free is not None and free < manifest.file_size + MARGIN_BYTES:
        raise DataError(_no_space_message(path, copy.parent, manifest.file_size))
    temporary = copy.with_name(f"{copy.name}.{platform.node()}.{os.getpid()}.tmp")
    try:
        copy_verified(path, manifest, temporary, on_progress)
        os.replace(temporary, copy)
    finally:
        temporary.unlink(missing_ok=True)
    fsync_folder(copy.parent)
    atomic_write_text(manifest_path(copy), manifest.model_dump_json(), 0o600)


def _read_ahead(copy: Path, on_progress: Callable[[int], None]) -> None:
    """Read as much of the copy into the page cache as memory can hold: another job's files may have evicted it."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with copy.open("rb") as stream:
        for number, start in enumerate(range(0, min(copy.stat().st_size, memory), READ_AHEAD_BYTES)):
            os.posix_fadvise(stream.fileno(), start, READ_AHEAD_BYTES, os.POSIX_FADV_WILLNEED)
            if number % 1000 == 0:
                on_progress(start)


def delete_copy(copy: Path) -> None:
    """Remove a copy. A process that has it open can still read it."""
    manifest_path(copy).unlink(missing_ok=True)
    copy.unlink(missing_ok=True)


def _private_folder(folder: Path) -> Path:
    """This user's own folder below one that may be shared: no other user can put a file or a link there."""
    private = folder / f"hydra-{os.geteuid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        private.mkdir(mode=0o700, exist_ok=True)
        status = private.lstat()
    except OSError as error:
        raise DataError(f"data.stage_to = {folder} cannot be used on {platform.node()}: {error}") from None
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o022:
        raise DataError(
            f"{private} on {platform.node()} is not a folder that only user {os.geteuid()} writes to; "
            "remove it, or set another data.stage_to"
        )
    return private


def _is_usable(copy: Path, manifest: Manifest) -> bool:
    """Whether this user has made the copy, it passes `open_checked` and has the same manifest."""
    try:
        status = copy.lstat()
    except FileNotFoundError:
        return False
    try:
        usable = stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid() and open_checked(copy) == manifest
        reason = "it belongs to another user or is a copy of another file"
    except DataError as error:
        usable, reason = False, str(error)
    if not usable:
        log.warning("%s is replaced: %s", copy, reason)
    return usable


@contextmanager
def _copy_lock(private: Path, on_status: StatusCallback) -> Iterator[int]:
    """Hold the folder's lock, waiting for its holder as long as that makes progress; yields the file's descriptor."""
    lock = os.open(private / "lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    pause = threading.Event()
    last_status, last_change, last_log = "", time.monotonic(), time.monotonic()
    try:
        while not try_lock(lock):
            now, status = time.monotonic(), os.pread(lock, 4096, 0).decode(errors="replace")
            on_status(status)
            if status != last_status:
                last_status, last_change = status, now
            elif now - last_change > STALL_S:
                raise NodeCopyFailed(
                    f"{private} on {platform.node()} is locked and without progress for {now - last_change:.0f} s; "
                    f"it is held by {last_status or 'an unknown process'}; end that process"
                )
            if now - last_log > LOG_EVERY_S:
                last_log = now
                log.info("waiting for %s", last_status)
            pause.wait(POLL_S)
        _write_status(lock, "checking for an existing copy")
        yield lock
    finally:
        os.close(lock)


def _write_status(lock: int, activity: str) -> str:
    """Write into the lock file, for waiting processes, who holds the lock and how far it is; returns the line."""
    text = f"pid {os.getpid()} on {platform.node()}, {activity}"
    os.ftruncate(lock, os.pwrite(lock, text.encode(), 0))
    return text


def _no_space_message(path: Path, private: Path, size: int) -> str:
    free = free_bytes(private)
    names = [f"{p.name} ({readable(p.stat().st_size)})" for p in sorted(private.iterdir()) if manifest_path(p).exists()]
    return (
        f"{path} ({readable(size)}) does not fit into {private} on {platform.node()}, where "
        f"{'too little' if free is None else readable(free)} is free; free some space there (copies of other files: "
        f"{', '.join(names) or 'none'}), or set data.stage_to=null"
    )


class NodeCopyLoader(Loader):
    """Reads a copy; errors name the original, its `path`. Removes a damaged copy, so that a restart fixes it."""

    def __init__(self, path: Path, copy: Path, *, image_size: int, threads: int) -> None:
        super().__init__(copy, image_size=image_size, threads=threads)
        self.path, self._copy = path, copy

    def _collect(self, pending: PendingBatch) -> Batch:
        try:
            return super()._collect(pending)
        except CorruptSample as error:
            delete_copy(self._copy)
            damage = str(error).removeprefix(f"{self.path}: ").partition("; ")[0]
            # Not a DataError, which would end the run, nor caused by one: the original was intact when it was copied.
            raise LoaderError(
                f"{self.path}: its copy {self._copy} on {platform.node()} was damaged ({damage}) and is removed; "
                "the next start copies it again"
            ) from None
        except LoaderError as error:
            raise LoaderError(f"{error} (its copy {self._copy} on {platform.node()})") from error
