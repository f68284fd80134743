"""Writes the FFCV files of a data set: all or nothing, and never over an intact file by accident.

A supervised process (`pipeline.data.writing.process`) writes a file under a temporary name in its final folder, checks
it against its source and writes its manifest; then the manifest and, last, the file itself are renamed. So a file with
its final name is always complete, whenever the machine stops.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from pipeline.data.manifest import LARGEST_RESOLUTION, DataError, Manifest, manifest_path, open_checked
from pipeline.data.sources.decode import colour_text
from pipeline.data.sources.image_folder import AS_PUBLISHED, FolderOptions
from pipeline.data.sources.registry import open_source
from pipeline.data.sources.source import SPLITS, Source
from pipeline.data.writing.process import SplitJob, WriteJob, remove_temporary, run_writer
from pipeline.data.writing.verify import available_cores
from pipeline.run.files import fsync_folder
from pipeline.run.locks import lock, try_lock


@dataclass(frozen=True)
class WriteOptions:
    """How images are stored and how they are written."""

    workers: int | None = None
    """Processes; None means one per available core."""
    max_resolution: int = 500
    """Longer side in pixels; larger images are reduced to it."""
    jpeg_quality: int = 90
    """For images above 64 x 64 pixels; smaller ones are stored raw."""
    skip_broken: bool = False
    stall_seconds: float = 120.0
    """The writer is terminated after so long without progress."""

    def __post_init__(self) -> None:
        if self.workers is not None and self.workers < 1:
            raise DataError(f"workers {self.workers} must be at least 1")
        if not 1 <= self.max_resolution <= LARGEST_RESOLUTION:
            raise DataError(f"max_resolution {self.max_resolution} must lie in 1..{LARGEST_RESOLUTION}")
        if not 1 <= self.jpeg_quality <= 100:
            raise DataError(f"quality {self.jpeg_quality} must lie in 1..100")


@dataclass(frozen=True)
class Written:
    """A file of the data set after `write_dataset`."""

    path: Path
    manifest: Manifest
    was_there: bool
    """It had been written before, from the same source with the same options, and was kept."""


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
    folder: FolderOptions = AS_PUBLISHED,
) -> list[Written]:
    """Write out/train.beton and out/test.beton; an intact file of the same source and options is kept.

    `classes`, `extra` and `folder` as in `registry.open_source`: a subset of the classes, a file of extra training
    images, and how a tree of one's own images is read.
    progress is called with (stage, done, total), where stage is for example 'train scan'. Errors: DataError for a bad
    source, with all broken images in one message, or an existing file that must not be replaced; process.WriteError if
    writing fails. After an error there is neither a temporary file nor a new final one, except for a split that was
    complete by then.
    """
    sources = {split: open_source(dataset, split, source, classes, extra, folder) for split in SPLITS}
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"--out {out} cannot be made: {error.strerror or error}; name another folder") from None
    paths = {split: out / f"{split}.beton" for split in SPLITS}
    done = {s for s in SPLITS if not force and reusable_manifest(paths[s], sources[s], options, folder) is not None}
    to_do = [split for split in SPLITS if split not in done]
    if to_do:
        with ExitStack() as stack:
            temporaries = {split: stack.enter_context(temporary_beside(paths[split])) for split in to_do}
            job = WriteJob(
                dataset=dataset,
                source=str(source) if source else None,
                classes=list(classes),
                extra=str(extra) if extra else None,
                background=colour_text(folder.rendering.background),
                exif_rotate=folder.rendering.exif_rotate,
                val_fraction=str(folder.val_fraction) if folder.val_fraction else None,
                splits=[SplitJob(split, str(temporaries[split]), sources[split].sha256) for split in to_do],
                workers=options.workers or available_cores(),
                max_resolution=options.max_resolution,
                jpeg_quality=options.jpeg_quality,
                skip_broken=options.skip_broken,
                parent=os.getpid(),
            )
            run_writer(
                job, options.stall_seconds, progress, lambda split: commit_file(temporaries[split], paths[split])
            )
    return [Written(paths[split], open_checked(paths[split]), split in done) for split in SPLITS]


def reusable_manifest(
    path: Path, source: Source, options: WriteOptions, folder: FolderOptions = AS_PUBLISHED
) -> Manifest | None:
    """The manifest of an existing file that need not be written again; None if `path` may be written.

    A file with a manifest that does not pass `open_checked` was written by this project and is damaged: it may be
    replaced. Errors: DataError for an intact file of another source or other options, and for a file without a
    manifest, whose origin is unknown.
    """
    if not path.exists():
        return None
    if not manifest_path(path).exists():
        raise DataError(f"{path} exists and has no manifest, so its origin is unknown; --force replaces it")
    try:
        manifest = open_checked(path)
    except DataError:
        return None
    expected = {
        "dataset": source.dataset,
        "split": source.split,
        "class_names": list(source.class_names),
        "extra_source": source.extra_location,
        "source_sha256": source.sha256,
        "max_resolution": options.max_resolution,
        "jpeg_quality": options.jpeg_quality,
        "exif_rotate": folder.rendering.exif_rotate,
        "val_fraction": str(folder.val_fraction) if folder.val_fraction else None,
    }
    if {"alpha", "palette"} & set(manifest.converted):  # else there is nothing that a background would show through
        expected["background"] = colour_text(folder.rendering.background)
    differences = [name for name, value in expected.items() if getattr(manifest, name) != value]
    if differences:
        raise DataError(
            f"{path} exists and was written from {manifest.source} with other {', '.join(differences)}; "
            "--force replaces it, --out DIR writes elsewhere"
        )
    return manifest


@contextmanager
def temporary_beside(path: Path) -> Iterator[Path]:
    """A locked temporary file for `path`, removed at the end if it still exists.

    Other temporary files without a lock are leftovers of killed processes, and are removed. Errors: DataError if
    another process is writing `path`.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    ours = re.compile(re.escape(path.name) + r"\.\d+\.tmp")
    if temporary.exists():  # of a process that has died, or of one in another container, where it has the same pid
        _remove_unless_locked(temporary, path)
    try:
        stream = temporary.open("xb")
    except OSError as error:
        raise DataError(f"--out {path.parent} cannot be written: {error.strerror or error}") from None
    with stream:
        try:
            lock(stream)
            for other in sorted(path.parent.iterdir()):
                if other != temporary and ours.fullmatch(other.name):
                    _remove_unless_locked(other, path)
            yield temporary
        finally:
            remove_temporary(temporary)


def _remove_unless_locked(other: Path, path: Path) -> None:
    with other.open("rb") as stream:
        if not try_lock(stream):
            raise DataError(f"{path} is being written by another process ({other} is locked); wait for it")
        remove_temporary(other)


def commit_file(temporary: Path, path: Path) -> None:
    """Give a complete temporary file and its manifest their final names.

    The old file and manifest are removed first and the new file comes last, so that a file never lies beside the
    manifest of another.
    """
    open_checked(temporary)
    path.unlink(missing_ok=True)
    manifest_path(path).unlink(missing_ok=True)
    fsync_folder(path.parent)
    os.replace(manifest_path(temporary), manifest_path(path))
    os.replace(temporary, path)
    fsync_folder(path.parent)
