"""The writer process: scans, writes with FFCV, checks and hashes. Started by `pipeline.data.writing.process`.

It is a fresh interpreter, so that FFCV's workers are forked from a process without threads. Four times a second, a
timer signal checks that no worker has died and that the parent is alive: FFCV's own loop checks neither.
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
from fractions import Fraction
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
from pipeline.data.sources.decode import Rendering, fit_longer_side, parse_colour
from pipeline.data.sources.image_folder import FolderOptions
from pipeline.data.sources.registry import open_source
from pipeline.data.sources.source import Source
from pipeline.data.writing.process import SplitJob, WriteError, WriteJob, remove_temporary
from pipeline.data.writing.scan import Scan, refuse_broken, scan_source
from pipeline.data.writing.verify import check_samples, hash_file
from pipeline.run.files import atomic_write_json

POLL_SECONDS = 0.25
PR_SET_PDEATHSIG = 1
FFCV_CHUNK = 100
"""Samples per task of an FFCV worker, at most."""


class Reporter:
    """Reports the writer's progress to its parent, and ends the writer when the parent has died."""

    def __init__(self, descriptor: int, parent: int, on_orphaned: Callable[[], NoReturn]) -> None:
        self._descriptor, self._parent, self._on_orphaned = descriptor, parent, on_orphaned
        self._check: Callable[[], None] | None = None
        self._progress = ("start", 0, 0)
        self.split = ""
        signal.signal(signal.SIGALRM, self._on_timer)
        signal.setitimer(signal.ITIMER_REAL, POLL_SECONDS, POLL_SECONDS)

    def progress(self, stage: str, done: int, total: int) -> None:
        """Record progress; a new stage is reported at once, the rest at the next tick of the timer."""
        before, self._progress = self._progress, (f"{self.split} {stage}", done, total)
        if before[0] != self._progress[0]:
            self._send_progress()

    def set_check(self, check: Callable[[], None] | None) -> None:
        """Call `check` at every tick; an exception from it ends the writer."""
        self._check = check

    def send(self, message: dict[str, Any]) -> None:
        """Send one line. Short lines are atomic, so the timer cannot mix two; long ones are sent after `stop`."""
        data = json.dumps(message).encode() + b"\n"
        while data:
            data = data[os.write(self._descriptor, data) :]

    def stop(self) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)

    def _on_timer(self, number: int, frame: FrameType | None) -> None:
        if os.getppid() != self._parent:
            self._on_orphaned()
        if self._check is not None:
            self._check()
        self._send_progress()

    def _send_progress(self) -> None:
        self.send(dict(zip(("stage", "done", "total"), self._progress, strict=True)))


class WriterDataset:
    """The data set that FFCV's workers index: sample s as (pixels uint8 [height, width, 3], label)."""

    def __init__(self, source: Source, kept: NDArray[np.int64], max_resolution: int) -> None:
        self._source, self._kept, self._max_resolution = source, kept, max_resolution
        self._lock = multiprocessing.Lock()
        # Read without a lock: a worker may die while it holds one, and the reader must detect that, not wait.
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
    """Reap children that have succeeded. Errors: WriteError for one that has not."""
    while True:
        try:
            child = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return
        if child is None:
            return
        if child.si_code != os.CLD_EXITED:
            raise WriteError(f"a worker of the writer was killed by {signal.Signals(child.si_status).name}")
        if child.si_status != 0:
            raise WriteError("a worker of the writer failed")
        os.waitpid(child.si_pid, 0)


def die_with_parent() -> None:
    """In a forked worker: have the kernel kill it when the writer dies, as FFCV's workers would wait forever."""
    signal.signal(signal.SIGALRM, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def write_ffcv(path: Path, source: Source, scan: Scan, job: WriteJob, reporter: Reporter) -> None:
    """Write the samples with FFCV's DatasetWriter. Errors: WriteError if a worker dies."""
    dataset = WriterDataset(source, scan.kept, job.max_resolution)
    count = len(dataset)
    reporter.progress("write", 0, count)
    # Imported after the scan, so that a source with broken images is refused before the seconds that this takes.
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter

    fields = {
        "image": RGBImageField(write_mode=scan.image_mode, jpeg_quality=job.jpeg_quality),
        "label": IntField(),
    }
    page_size = scan.page_size(job.jpeg_quality)
    workers = max(1, min(job.workers, count, scan.image_bytes(job.jpeg_quality) // page_size))  # each fills pages

    def check_workers() -> None:
        raise_if_worker_died()
        reporter.progress("write", dataset.done, count)

    reporter.set_check(check_workers)
    DatasetWriter(str(path), fields, page_size, workers).from_indexed_dataset(
        dataset, chunksize=max(1, min(FFCV_CHUNK, count // (4 * workers)))
    )
    reporter.set_check(None)


def check_and_describe(path: Path, source: Source, scan: Scan, job: WriteJob, reporter: Reporter) -> Manifest:
    """Check a written file against its source, sample by sample, flush it to disk and return its manifest."""
    structure = check_structure(path)
    index = read_index(path, structure)
    labels = source.labels[scan.kept]
    sizes = np.stack([index.samples["height"], index.samples["width"]], axis=1)
    if not np.array_equal(index.samples["label"], labels) or not np.array_equal(sizes, scan.sizes):
        raise WriteError("the labels or sizes written differ from the source's; did it change meanwhile?")
    check = check_samples(
        path, index, reporter.progress, expected=lambda i: source.read(int(scan.kept[i]))[0].tobytes()
    )
    if check.faults:
        first = "; ".join(f"{source.names[scan.kept[i]]}: {fault}" for i, fault in list(check.faults.items())[:10])
        raise WriteError(f"{len(check.faults)} samples were written incorrectly: {first}")
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
        num_extra=int((scan.kept >= len(source.labels) - source.num_extra).sum()),
        extra_source=source.extra_location,
        num_classes=len(source.class_names),
        class_names=list(source.class_names),
        chosen_from=list(source.chosen_from) if source.chosen_from else None,
        label_histogram=np.bincount(labels, minlength=len(source.class_names)).tolist(),
        image_mode=scan.image_mode,
        max_resolution=job.max_resolution,
        jpeg_quality=job.jpeg_quality,
        skipped=[Skipped(path=name, reason=reason) for name, reason in scan.skipped],
        converted=scan.converted,
        passed_over=source.passed_over,
        background=job.background,
        exif_rotate=job.exif_rotate,
        val_fraction=job.val_fraction,
        file_size=structure.file_size,
        sha256=sha256,
        index_sha256=index_sha256(path, structure),
        content_sha256=check.content_sha256,
        pages=pages,
        sample_crc32=check.crc32_base64,
        versions={
            **{name: importlib.metadata.version(name) for name in ("ffcv", "numpy", "pillow")},
            "opencv": cv2.__version__,
        },
        written_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def check_free_space(folder: Path, needed: int) -> None:
    """Errors: WriteError if `folder` has fewer bytes free than `needed`."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise WriteError(f"{folder} has {free / 1e9:.1f} GB free, the files need about {needed / 1e9:.1f} GB")


def folder_options(job: WriteJob) -> FolderOptions:
    background = None if job.background is None else parse_colour(job.background)
    fraction = None if job.val_fraction is None else Fraction(job.val_fraction)
    return FolderOptions(Rendering(background, job.exif_rotate), fraction)


def open_unchanged(job: WriteJob, part: SplitJob) -> Source:
    path, extra = (Path(name) if name else None for name in (job.source, job.extra))
    source = open_source(job.dataset, part.split, path, job.classes, extra, folder_options(job))
    if source.sha256 != part.source_sha256:
        raise DataError(f"{source.location} changed while it was being listed; wait until it is complete")
    return source


def write_splits(job: WriteJob, reporter: Reporter) -> None:
    """Scan all splits, then write them one after another; reports each one to the parent when it is complete."""
    scans = []
    for part in job.splits:
        reporter.split = part.split
        reporter.progress("list", 0, 1)
        source = open_unchanged(job, part)
        scans.append((source, scan_source(source, job.max_resolution, reporter.progress)))
    refuse_broken(scans, job.skip_broken)
    needed = sum(scan.estimated_bytes(job.jpeg_quality) for _, scan in scans)
    check_free_space(Path(job.splits[0].temporary).parent, needed)
    for part, (source, scan) in zip(job.splits, scans, strict=True):
        reporter.split, temporary = part.split, Path(part.temporary)
        write_ffcv(temporary, source, scan, job, reporter)
        manifest = check_and_describe(temporary, source, scan, job, reporter)
        atomic_write_json(manifest_path(temporary), manifest.model_dump())
        reporter.send({"ready": part.split})


def abort(job: WriteJob) -> NoReturn:
    """Exit at once: FFCV's queues would wait for workers that no longer read."""
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
    reporter = Reporter(int(arguments[0]), job.parent, on_orphaned=partial(abort, job))
    try:
        write_splits(job, reporter)
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
            abort(job)


if __name__ == "__main__":
    main(sys.argv[1:])
