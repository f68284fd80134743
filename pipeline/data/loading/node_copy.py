"""Copies of FFCV files on a node's own disk, for workers to read instead of a file server's original.

    <stage_to>/hydra-<uid>/train-0123456789abcdef.beton   + its manifest, and `lock`

The name holds the manifest's SHA-256, so that another file never meets the copy and the next job finds it again. The
folder belongs to one user alone. One process of a node copies, the others wait for it. Copying fills the page cache; a
copy that is used again is read ahead into it.

What is verified: each page while it is copied, by the manifest's hash; when a copy is used again, that its manifest is
the original's, its size and its index. Its images are not read again then: for a large file that would take minutes of
every start, and the loader compares each one with its checksum before decoding it anyway. A copy found damaged there
is removed, and made anew by the next start.
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
"""Without progress of the copier for so long, those who wait for it give up."""
LOOK_S = 0.25
"""How often they look."""
TELL_S = 10.0
"""How often a long wait is logged."""
MARGIN_BYTES = 64 << 20
WARM_BYTES = 128 << 10
"""How much is read ahead at a time: Linux ignores what goes beyond a device's own limit, which is rarely less."""


class NodeCopyFailed(RuntimeError):
    """A good file was not copied: a disk or a file server fails, or whoever was copying hangs."""


Listener = Callable[[str], None]
"""Told again and again who copies, and how far; the same words mean that nothing has moved. May raise to end it all."""


def _unheard(doing: str) -> None:
    """Nobody listens."""


def copy_to_node(path: Path, folder: Path, heard: Listener = _unheard) -> Path:
    """The copy of FFCV file `path` below `folder`, made now if it is not there.

    Errors: DataError, naming the original, for a file that is damaged or does not fit on the disk, and for a folder
    that is not ours. StagingFailed for what another try may mend.
    """
    manifest, private = open_checked(path), _private(folder)
    copy = private / f"{path.stem}-{manifest.sha256[:16]}{path.suffix}"
    try:
        with _sole_copier(private, heard) as lock:
            for left in (*private.glob(f"*.{platform.node()}.*.tmp"), *private.glob(".*.manifest.json.*.tmp")):
                left.unlink()  # whoever made it has died: the lock is ours
            if _usable(copy, manifest):
                log.info("%s: using its copy %s", path, copy)
                _warm(copy, lambda done: heard(_say(lock, f"reading {copy}: {done} of {manifest.file_size} bytes")))
            else:
                delete_copy(copy)
                _make(path, manifest, copy, lock, heard)
    except OSError as error:
        if error.errno in FULL:
            raise DataError(_no_room(path, private, manifest.file_size)) from None
        raise NodeCopyFailed(f"{path} was not copied to {private} on {platform.node()}: {error}") from error
    return copy


def _make(path: Path, manifest: Manifest, copy: Path, lock: int, heard: Listener) -> None:
    """Copy under another name; the manifest comes last, and without it there is no copy."""

    def progressed(done: int) -> None:
        heard(_say(lock, f"copying {path}: {done} of {manifest.file_size} bytes"))

    free = free_bytes(copy.parent)
    if free is not None and free < manifest.file_size + MARGIN_BYTES:
        raise DataError(_no_room(path, copy.parent, manifest.file_size))
    temporary = copy.with_name(f"{copy.name}.{platform.node()}.{os.getpid()}.tmp")
    try:
        copy_verified(path, manifest, temporary, progressed)
        os.replace(temporary, copy)
    finally:
        temporary.unlink(missing_ok=True)
    fsync_folder(copy.parent)
    atomic_write_text(manifest_path(copy), manifest.model_dump_json(), 0o600)


def _warm(copy: Path, progressed: Callable[[int], None]) -> None:
    """Have the system read the copy ahead, as far as its memory goes: another job's files may have pushed it out."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with copy.open("rb") as stream:
        for number, start in enumerate(range(0, min(copy.stat().st_size, memory), WARM_BYTES)):
            os.posix_fadvise(stream.fileno(), start, WARM_BYTES, os.POSIX_FADV_WILLNEED)
            if number % 1000 == 0:
                progressed(start)


def delete_copy(copy: Path) -> None:
    """Remove a copy. Who has it open goes on reading it."""
    manifest_path(copy).unlink(missing_ok=True)
    copy.unlink(missing_ok=True)


def _private(folder: Path) -> Path:
    """This user's own folder below one that others may share: nobody else can put a file there, or a link."""
    private = folder / f"hydra-{os.geteuid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        private.mkdir(mode=0o700, exist_ok=True)
        facts = private.lstat()
    except OSError as error:
        raise DataError(f"data.stage_to = {folder} cannot be used on {platform.node()}: {error}") from None
    if not stat.S_ISDIR(facts.st_mode) or facts.st_uid != os.geteuid() or facts.st_mode & 0o022:
        raise DataError(
            f"{private} on {platform.node()} is not a folder that only user {os.geteuid()} writes to; "
            "remove it, or set another data.stage_to"
        )
    return private


def _usable(copy: Path, manifest: Manifest) -> bool:
    """Whether there is a copy that this user made, whole as far as `open_checked` sees, with the same manifest."""
    try:
        facts = copy.lstat()
    except FileNotFoundError:
        return False
    try:
        whole = stat.S_ISREG(facts.st_mode) and facts.st_uid == os.geteuid() and open_checked(copy) == manifest
        said = "it is not ours, or another file's"
    except DataError as error:
        whole, said = False, str(error)
    if not whole:
        log.warning("%s is replaced: %s", copy, said)
    return whole


@contextmanager
def _sole_copier(private: Path, heard: Listener) -> Iterator[int]:
    """Hold the folder's lock, waiting for whoever has it as long as they get on; yields the lock file's descriptor."""
    lock = os.open(private / "lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    pause = threading.Event()
    said, since, told = "", time.monotonic(), time.monotonic()
    try:
        while not try_lock(lock):
            now, found = time.monotonic(), os.pread(lock, 4096, 0).decode(errors="replace")
            heard(found)
            if found != said:
                said, since = found, now
            elif now - since > STALL_S:
                raise NodeCopyFailed(
                    f"{private} on {platform.node()} is locked and without progress for {now - since:.0f} s; "
                    f"who holds it: {said or 'nobody who said so'}; end that process"
                )
            if now - told > TELL_S:
                told = now
                log.info("waiting for %s", said)
            pause.wait(LOOK_S)
        _say(lock, "looking for what is there")
        yield lock
    finally:
        os.close(lock)


def _say(lock: int, doing: str) -> str:
    """Tell those who wait who has the lock, and how far they are; returns the words."""
    text = f"pid {os.getpid()} on {platform.node()}, {doing}"
    os.ftruncate(lock, os.pwrite(lock, text.encode(), 0))
    return text


def _no_room(path: Path, private: Path, size: int) -> str:
    free = free_bytes(private)
    names = [f"{p.name} ({readable(p.stat().st_size)})" for p in sorted(private.iterdir()) if manifest_path(p).exists()]
    return (
        f"{path} ({readable(size)}) does not fit into {private} on {platform.node()}, where "
        f"{'too little' if free is None else readable(free)} is free; make room there (copies of other files: "
        f"{', '.join(names) or 'none'}), or set data.stage_to=null"
    )


class NodeCopyLoader(Loader):
    """Reads a copy and speaks of the original, which is its `path`. A damaged copy is removed: a restart mends it."""

    def __init__(self, path: Path, copy: Path, *, image_size: int, threads: int) -> None:
        super().__init__(copy, image_size=image_size, threads=threads)
        self.path, self._copy = path, copy

    def _finished(self, begun: PendingBatch) -> Batch:
        try:
            return super()._finished(begun)
        except CorruptSample as error:
            delete_copy(self._copy)
            said = str(error).removeprefix(f"{self.path}: ").partition("; ")[0]
            # Not a DataError, which would end the run, nor caused by one: the original is good, as it was when copied.
            raise LoaderError(
                f"{self.path}: its copy {self._copy} on {platform.node()} was damaged ({said}) and is removed; "
                "the next start copies it again"
            ) from None
        except LoaderError as error:
            raise LoaderError(f"{error} (its copy {self._copy} on {platform.node()})") from error
