"""The writer process: scan, write with FFCV, check, hash. Started by `pipeline.data.writing.process`.

It begins as a fresh interpreter, so that FFCV's workers are forked from a process without threads. A timer signal
looks, four times a second, whether a worker has died and whether the parent still lives: FFCV's own loop asks neither.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import json
import multiprocessing
import os
import shutil
import signal
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import cv2
import numpy as np
from numpy.typing import NDArray

from pipeline.data.manifest import (
    DataError,
    Manifest,
    Skipped,
    check_structure,
    index_sha256,
    manifest_path,
    read_index,
)
from pipeline.data.sources.decode import fit_longer_side
from pipeline.data.sources.registry import open_source
from pipeline.data.sources.source import Source
from pipeline.data.writing.process import SplitJob, WriteError, WriteJob, remove_temporary
from pipeline.data.writing.scan import Scan, refuse_broken, scan
from pipeline.data.writing.verify import check_samples, hash_file
from pipeline.run.files import atomic_write_json

LOOK_SECONDS = 0.25
PR_SET_PDEATHSIG = 1
FFCV_CHUNK = 100
"""Samples that an FFCV worker takes at a time, at most."""


class Reporter:
    """Tells the parent how far the writer is, and ends the writer when its parent is gone."""

    def __init__(self, descriptor: int, parent: int, orphaned: Callable[[], NoReturn]) -> None:
        self._descriptor, self._parent, self._orphaned = descriptor, parent, orphaned
        self._look: Callable[[], None] | None = None
        self._position = ("start", 0, 0)
        self.split = ""
        signal.signal(signal.SIGALRM, self._on_timer)
        signal.setitimer(signal.ITIMER_REAL, LOOK_SECONDS, LOOK_SECONDS)

    def progress(self, stage: str, done: int, total: int) -> None:
        """Note a position; a new stage is told at once, the rest by the timer."""
        before, self._position = self._position, (f"{self.split} {stage}", done, total)
        if before[0] != self._position[0]:
            self._tell()

    def watch(self, look: Callable[[], None] | None) -> None:
        """Call `look` on every tick; what it raises ends the writer."""
        self._look = look

    def send(self, message: dict[str, Any]) -> None:
        """One line for the parent. Short ones are atomic, so the timer cannot mix two; long ones come after `stop`."""
        data = json.dumps(message).encode() + b"\n"
        while data:
            data = data[os.write(self._descriptor, data) :]

    def stop(self) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)

    def _on_timer(self, number: int, frame: FrameType | None) -> None:
        if os.getppid() != self._parent:
            self._orphaned()
        if self._look is not None:
            self._look()
        self._tell()

    def _tell(self) -> None:
        self.send(dict(zip(("stage", "done", "total"), self._position, strict=True)))


class Converted:
    """What FFCV's workers index: sample s as (pixels uint8 [height, width, 3], label)."""

    def __init__(self, source: Source, kept: NDArray[np.int64], max_resolution: int) -> None:
        self._source, self._kept, self._max_resolution = source, kept, max_resolution
        self._lock = multiprocessing.Lock()
        # Without a lock for reading: a worker may die while it holds it, and the reader must notice, not wait.
        self._done = multiprocessing.RawValue(ctypes.c_uint64, 0)

    @property
    def done(self) -> int:
        return self._done.value

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, sample: int) -> tuple[NDArray[np.uint8], int]:
        i = int(self._kept[sample])
        pixels, _ = self._source.read(i)
        with self._lock:
            self._done.value += 1
        return fit_longer_side(pixels, self._max_resolution), int(self._source.labels[i])


def raise_if_worker_died() -> None:
    """Collect children that ended well; raise WriteError for one that did not."""
    while True:
        try:
            ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return
        if ended is None:
            return
        if ended.si_code != os.CLD_EXITED:
            raise WriteError(f"a worker of the writer was killed by {signal.Signals(ended.si_status).name}")
        if ended.si_status != 0:
            raise WriteError("a worker of the writer failed")
        os.waitpid(ended.si_pid, 0)


def die_with_parent() -> None:
    """In a forked worker: be killed when the writer dies, as FFCV's workers would wait for work for ever."""
    signal.signal(signal.SIGALRM, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def write_ffcv(path: Path, source: Source, scanned: Scan, job: WriteJob, reporter: Reporter) -> None:
    """Write the samples with FFCV's DatasetWriter. Errors: WriteError if a worker dies."""
    dataset = Converted(source, scanned.kept, job.max_resolution)
    count = len(dataset)
    reporter.progress("write", 0, count)
    # After the scan, so that a source with broken images is refused without the seconds that this takes.
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter

    fields = {
        "image": RGBImageField(write_mode=scanned.image_mode, jpeg_quality=job.jpeg_quality),
        "label": IntField(),
    }
    workers = min(job.workers, count)

    def look() -> None:
        raise_if_worker_died()
        reporter.progress("write", dataset.done, count)

    reporter.watch(look)
    DatasetWriter(str(path), fields, num_workers=workers).from_indexed_dataset(
        dataset, chunksize=max(1, min(FFCV_CHUNK, count // (4 * workers)))
    )
    reporter.watch(None)


def finish(path: Path, source: Source, scanned: Scan, job: WriteJob, reporter: Reporter) -> Manifest:
    """Check a written file against its source, sample by sample, flush it to disk and describe it."""
    structure = check_structure(path)
    index = read_index(path, structure)
    labels = source.labels[scanned.kept]
    sizes = np.stack([index.samples["height"], index.samples["width"]], axis=1)
    if not np.array_equal(index.samples["label"], labels) or not np.array_equal(sizes, scanned.sizes):
        raise WriteError("the labels or sizes written are not those of the source; did it change meanwhile?")
    checked = check_samples(
        path, index, reporter.progress, expected=lambda i: source.read(int(scanned.kept[i]))[0].tobytes()
    )
    if checked.faults:
        shown = "; ".join(f"{source.names[scanned.kept[i]]}: {fault}" for i, fault in list(checked.faults.items())[:10])
        raise WriteError(f"{len(checked.faults)} samples were not written as they should be: {shown}")
    reporter.progress("flush", 0, 1)
    with path.open("rb+") as stream:
        os.fsync(stream.fileno())
    sha256, pages = hash_file(path, reporter.progress)
    return Manifest(
        dataset=source.dataset,
        split=source.split,
        source=source.location,
        source_sha256=source.sha256,
        authors_md5=source.authors_md5,
        num_samples=structure.num_samples,
        num_extra=int((scanned.kept >= len(source.labels) - source.num_extra).sum()),
        extra_source=source.extra_location,
        num_classes=len(source.class_names),
        class_names=list(source.class_names),
        chosen_from=list(source.chosen_from) if source.chosen_from else None,
        label_histogram=np.bincount(labels, minlength=len(source.class_names)).tolist(),
        image_mode=scanned.image_mode,
        max_resolution=job.max_resolution,
        jpeg_quality=job.jpeg_quality,
        skipped=[Skipped(path=name, reason=reason) for name, reason in scanned.skipped],
        converted=scanned.converted,
        file_size=structure.file_size,
        sha256=sha256,
        index_sha256=index_sha256(path, structure),
        content_sha256=checked.content_sha256,
        pages=pages,
        sample_crc32=checked.crc32_base64,
        versions={
            **{name: importlib.metadata.version(name) for name in ("ffcv", "numpy", "pillow")},
            "opencv": cv2.__version__,
        },
        written_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def check_free_space(folder: Path, needed: int) -> None:
    """Raise WriteError if the files, as estimated, do not fit on the disk."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise WriteError(f"{folder} has {free / 1e9:.1f} GB free, the files need about {needed / 1e9:.1f} GB")


def open_listed(job: WriteJob, part: SplitJob) -> Source:
    place, extra = (Path(name) if name else None for name in (job.source, job.extra))
    source = open_source(job.dataset, part.split, place, job.classes, extra)
    if source.sha256 != part.source_sha256:
        raise DataError(f"{source.location} changed while it was being listed; wait until it is complete")
    return source


def convert(job: WriteJob, reporter: Reporter) -> None:
    """Scan all splits, then write them one after another, telling the parent of each one that is complete."""
    scans = []
    for part in job.splits:
        reporter.split = part.split
        reporter.progress("list", 0, 1)
        source = open_listed(job, part)
        scans.append((source, scan(source, job.max_resolution, reporter.progress)))
    refuse_broken(scans, job.skip_broken)
    needed = sum(scanned.estimated_bytes(job.jpeg_quality) for _, scanned in scans)
    check_free_space(Path(job.splits[0].temporary).parent, needed)
    for part, (source, scanned) in zip(job.splits, scans, strict=True):
        reporter.split, temporary = part.split, Path(part.temporary)
        write_ffcv(temporary, source, scanned, job, reporter)
        manifest = finish(temporary, source, scanned, job, reporter)
        atomic_write_json(manifest_path(temporary), manifest.model_dump())
        reporter.send({"ready": part.split})


def abandon(job: WriteJob) -> NoReturn:
    """End without waiting for anybody: FFCV's queues would wait for workers that no longer read."""
    for child in multiprocessing.active_children():
        child.kill()
    for part in job.splits:
        remove_temporary(Path(part.temporary))
    sys.stderr.flush()
    os._exit(1)


def main(arguments: list[str]) -> None:
    values = json.loads(arguments[1])
    job = WriteJob(**{**values, "splits": [SplitJob(**part) for part in values["splits"]]})
    cv2.setNumThreads(0)
    os.register_at_fork(after_in_child=die_with_parent)
    reporter = Reporter(int(arguments[0]), job.parent, orphaned=partial(abandon, job))
    try:
        convert(job, reporter)
        reporter.stop()
    except BaseException as error:
        reporter.stop()
        expected = isinstance(error, DataError | WriteError)
        if not expected:
            sys.excepthook(type(error), error, error.__traceback__)  # the parent finds the reason in the log
        kind = "data" if isinstance(error, DataError) else "write"
        try:
            reporter.send({"failed": str(error) if expected else "the writer failed", "kind": kind})
        finally:
            abandon(job)


if __name__ == "__main__":
    main(sys.argv[1:])
