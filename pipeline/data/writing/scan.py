"""Decodes every source image before anything is written, so that all broken ones are reported together."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.data.manifest import DataError
from pipeline.data.sources.decode import BrokenImage, fitted_size
from pipeline.data.sources.source import Source
from pipeline.data.writing.verify import CHUNK, ProgressCallback, available_cores, thread_pool

RAW_LIMIT = 64
"""Images of up to 64 x 64 pixels are stored raw, bit-exact; JPEG would cost accuracy there and save little."""
SMALL_PAGE, LARGE_PAGE = 2 << 20, 8 << 20
"""The smallest page that FFCV writes, and its usual one, in bytes."""
SMALL_FILE = 64 << 20
"""Images of fewer bytes are stored in small pages."""

_Outcome = tuple[str, tuple[str, ...], tuple[int, int]]
"""What became of an image ('kept', 'broken', 'unreadable'), its kinds or the reason, its stored height and width."""


@dataclass(frozen=True)
class Scan:
    """Which images of a source can be written, and their stored sizes."""

    kept: NDArray[np.int64]
    """Indices into the source, ascending: sample s of the file is image kept[s]."""
    sizes: NDArray[np.int64]
    """Shape [len(kept), 2]: stored height and width."""
    converted: dict[str, int]
    skipped: list[tuple[str, str]]
    """(name, reason) of the images that cannot be decoded."""
    unreadable: list[tuple[str, str]]
    """(name, reason) of files that the operating system fails to read; these are never skipped."""

    @property
    def image_mode(self) -> str:
        """'raw' if every image is small, else 'jpg'."""
        return "raw" if self.sizes.max() <= RAW_LIMIT else "jpg"

    def image_bytes(self, jpeg_quality: int) -> int:
        """A generous estimate of what the images take; ImageNet takes 0.27 bytes per pixel at quality 90, and 0.73 at
        100 (FFCV's table of file sizes)."""
        pixels = int(self.sizes.prod(axis=1).sum())
        return int(pixels * (3.0 if self.image_mode == "raw" else 0.35 if jpeg_quality <= 90 else 0.9))

    def estimated_bytes(self, jpeg_quality: int) -> int:
        """A generous estimate of the file's size."""
        return self.image_bytes(jpeg_quality) + 48 * len(self.kept) + LARGE_PAGE

    def page_size(self, jpeg_quality: int) -> int:
        """Bytes of a page of the FFCV file: the index and every worker take at least one, so few images get small ones.

        A page must hold any image, a JPEG also if it is larger than its pixels.
        """
        largest = 4 * int(self.sizes.prod(axis=1).max())
        return SMALL_PAGE if largest <= SMALL_PAGE and self.image_bytes(jpeg_quality) < SMALL_FILE else LARGE_PAGE


def scan_source(source: Source, max_resolution: int, progress: ProgressCallback) -> Scan:
    """Decode all images of `source` in parallel."""
    count = len(source.names)

    def scan_chunk(start: int) -> list[_Outcome]:
        outcomes: list[_Outcome] = []
        for i in range(start, min(start + CHUNK, count)):
            try:
                pixels, kinds = source.read(i)
            except BrokenImage as error:
                outcomes.append(("broken", (str(error),), (0, 0)))
            except OSError as error:
                outcomes.append(("unreadable", (error.strerror or str(error),), (0, 0)))
            else:
                outcomes.append(("kept", kinds, fitted_size(pixels.shape[0], pixels.shape[1], max_resolution)))
        return outcomes

    outcomes: list[_Outcome] = []
    progress("scan", 0, count)
    with thread_pool(available_cores()) as pool:
        for chunk in pool.map(scan_chunk, range(0, count, CHUNK)):
            outcomes.extend(chunk)
            progress("scan", len(outcomes), count)
    kept = [i for i, outcome in enumerate(outcomes) if outcome[0] == "kept"]
    kinds = Counter(kind for i in kept for kind in outcomes[i][1])

    def names_and_reasons(category: str) -> list[tuple[str, str]]:
        return [(source.names[i], outcome[1][0]) for i, outcome in enumerate(outcomes) if outcome[0] == category]

    return Scan(
        kept=np.array(kept, np.int64),
        sizes=np.array([outcomes[i][2] for i in kept], np.int64).reshape(-1, 2),
        converted=dict(sorted(kinds.items())),
        skipped=names_and_reasons("broken"),
        unreadable=names_and_reasons("unreadable"),
    )


def refuse_broken(scans: list[tuple[Source, Scan]], skip_broken: bool) -> None:
    """Raise one DataError that lists every image of all splits that cannot be written, if there is any."""
    lines = []
    for source, scan in scans:
        broken = scan.unreadable + ([] if skip_broken else scan.skipped)
        lines.extend(f"  {source.location}/{name}: {reason}" for name, reason in broken)
    if lines:
        raise DataError(
            f"{len(lines)} images cannot be read or decoded:\n"
            + "\n".join(lines)
            + "\nrepair or remove them, or pass --skip-broken to omit undecodable ones and record them in the manifest"
        )
    for source, scan in scans:
        counts = np.bincount(source.labels[scan.kept], minlength=len(source.class_names))
        empty = [source.class_names[label] for label in np.flatnonzero(counts == 0)]
        if empty:
            raise DataError(f"{source.location}: every image of these classes is broken: {', '.join(empty)}")
