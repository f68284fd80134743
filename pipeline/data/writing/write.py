"""Writing the FFCV files of a data set: all or nothing, and never over a good file by accident.

A file is written under a temporary name in its own folder by a supervised process (`pipeline.data.writing.process`),
checked there against its source and described; then its manifest and, last of all, the file itself are renamed. So
whatever lies under the final name is complete, at whatever moment the machine stops.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from pipeline.data.manifest import DataError, Manifest, manifest_path, open_checked
from pipeline.data.sources.registry import open_source
from pipeline.data.sources.source import SPLITS, Source
from pipeline.data.writing.process import SplitJob, WriteJob, remove_temporary, run_watched
from pipeline.data.writing.verify import available_cores
from pipeline.run.files import fsync_folder
from pipeline.run.locks import lock, try_lock

LARGEST_RESOLUTION = 1600
"""An image must fit into one 8 MiB page of the file, however badly it compresses."""


@dataclass(frozen=True)
class WriteOptions:
    """How images are stored, and how hard to try."""

    workers: int | None = None
    """Processes; None means one per core that may be used."""
    max_resolution: int = 500
    """Longer side in pixels; larger images are shrunk."""
    jpeg_quality: int = 90
    """For images above 64 x 64 pixels; smaller ones are stored raw."""
    skip_broken: bool = False
    stall_seconds: float = 120.0
    """Without progress for so long, the writer is ended."""

    def __post_init__(self) -> None:
        if self.workers is not None and self.workers < 1:
            raise DataError(f"workers {self.workers} must be at least 1")
        if not 1 <= self.max_resolution <= LARGEST_RESOLUTION:
            raise DataError(f"max_resolution {self.max_resolution} must lie in 1..{LARGEST_RESOLUTION}")
        if not 1 <= self.jpeg_quality <= 100:
            raise DataError(f"quality {self.jpeg_quality} must lie in 1..100")


@dataclass(frozen=True)
class Written:
    """One file that is now there."""

    path: Path
    manifest: Manifest
    was_there: bool
    """It had been written before, from the same source in the same way, and was left as it is."""


def write_dataset(
    dataset: str,
    source: Path | None,
    out: Path,
    options: WriteOptions,
    force: bool,
    progress: Callable[[str, int, int], None],
    *,
    classes: Sequence[str] = (),
    extra: Path | None = None,
) -> list[Written]:
    """Write out/train.beton and out/test.beton; a good file of the same source and options is left as it is.

    `classes` and `extra` as `datasets.open_source`: some of the classes only, and a file of extra training images.
    progress is called with (stage, done, total), stage being for example 'train scan'. Errors: DataError if the source
    or an existing file stands in the way, with all broken images in one message; watch.WriteError if writing failed.
    After an error neither a new final file nor a temporary one is left, except for a split that was complete before.
    """
    sources = {split: open_source(dataset, split, source, classes, extra) for split in SPLITS}
    out.mkdir(parents=True, exist_ok=True)
    paths = {split: out / f"{split}.beton" for split in SPLITS}
    done = {} if force else {s: m for s in SPLITS if (m := existing(paths[s], sources[s], options)) is not None}
    to_do = [split for split in SPLITS if split not in done]
    if to_do:
        with ExitStack() as stack:
            temporaries = {split: stack.enter_context(temporary_beside(paths[split])) for split in to_do}
            job = WriteJob(
                dataset=dataset,
                source=str(source) if source else None,
                classes=list(classes),
                extra=str(extra) if extra else None,
                splits=[SplitJob(split, str(temporaries[split]), sources[split].sha256) for split in to_do],
                workers=options.workers or available_cores(),
                max_resolution=options.max_resolution,
                jpeg_quality=options.jpeg_quality,
                skip_broken=options.skip_broken,
                parent=os.getpid(),
            )
            run_watched(job, options.stall_seconds, progress, lambda split: commit(temporaries[split], paths[split]))
    return [Written(paths[split], open_checked(paths[split]), split in done) for split in SPLITS]


def existing(path: Path, source: Source, options: WriteOptions) -> Manifest | None:
    """The manifest of a file that need not be written again; None if the way is free.

    A file with a manifest that does not pass `open_checked` was written here and is damaged: it may be replaced.
    Errors: DataError for a good file of something else, or a file without manifest, which somebody else may have made.
    """
    if not path.exists():
        return None
    if not manifest_path(path).exists():
        raise DataError(f"{path} exists and has no manifest, so it is not known what it is; --force replaces it")
    try:
        manifest = open_checked(path)
    except DataError:
        return None
    wanted = {
        "dataset": source.dataset,
        "split": source.split,
        "class_names": list(source.class_names),
        "extra_source": source.extra_location,
        "source_sha256": source.sha256,
        "max_resolution": options.max_resolution,
        "jpeg_quality": options.jpeg_quality,
    }
    differing = [name for name, value in wanted.items() if getattr(manifest, name) != value]
    if differing:
        raise DataError(
            f"{path} exists and was written from {manifest.source} with other {', '.join(differing)}; "
            "--force replaces it, --out DIR writes elsewhere"
        )
    return manifest


@contextmanager
def temporary_beside(path: Path) -> Iterator[Path]:
    """A locked temporary file for `path`, removed at the end if it is still there.

    Temporary files that nobody holds locked are what a killed machine left, and are removed. Errors: DataError if
    another process is writing `path`.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    remove_temporary(temporary)
    with temporary.open("xb") as stream:
        try:
            lock(stream)
            for other in sorted(path.parent.glob(f"{path.name}.*.tmp")):
                if other != temporary:
                    _remove_unless_locked(other, path)
            yield temporary
        finally:
            remove_temporary(temporary)


def _remove_unless_locked(other: Path, path: Path) -> None:
    with other.open("rb") as stream:
        if not try_lock(stream):
            raise DataError(f"{path} is being written by another process ({other} is locked); wait for it")
        remove_temporary(other)


def commit(temporary: Path, path: Path) -> None:
    """Give a complete temporary file its final name.

    The old pair goes first and the file comes last, so that no file ever stands beside the manifest of another.
    """
    open_checked(temporary)
    path.unlink(missing_ok=True)
    manifest_path(path).unlink(missing_ok=True)
    fsync_folder(path.parent)
    os.replace(manifest_path(temporary), manifest_path(path))
    os.replace(temporary, path)
    fsync_folder(path.parent)
