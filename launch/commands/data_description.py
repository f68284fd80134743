"""What `data write` and `data info` print of a data file."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import numpy as np
from numpy.typing import NDArray

from pipeline.run.printable import printable_line

if TYPE_CHECKING:
    from pipeline.data.manifest import Manifest
    from pipeline.data.writing.write import Written


def print_written(file: Written) -> None:
    manifest = file.manifest
    _show(
        f"{file.path}: {'already written' if file.was_there else 'written'}, {manifest.num_samples} images, "
        f"{manifest.num_classes} classes, {manifest.file_size / 1e6:.1f} MB, stored as {manifest.image_mode}"
    )
    if manifest.num_extra:
        _show(f"  the last {manifest.num_extra} images are extra, from {manifest.extra_source}")
    for name in _files_not_as_published(manifest):
        _show(f"  warning: {name} is not its authors' file: its MD5 differs from the published one", sys.stderr)
    _print_readings(manifest)
    for image in manifest.skipped:
        _show(f"  skipped {image.path}: {image.reason}")


def print_info(path: Path, manifest: Manifest, samples: NDArray[np.void]) -> None:
    """`samples` as in `manifest.SampleIndex`."""
    stored = "raw, bit-exact"
    if manifest.image_mode == "jpg":
        stored = f"JPEG, quality {manifest.jpeg_quality}, longer side at most {manifest.max_resolution}"
    _show(f"{path}")
    _show(f"  data set   {manifest.dataset}, split {manifest.split}, from {manifest.source}")
    if manifest.authors_md5:
        changed = ", ".join(_files_not_as_published(manifest))
        _show(f"  MD5        {f'not as published: {changed}' if changed else 'as its authors published'}")
    if manifest.extra_source:
        _show(f"  extra      the last {manifest.num_extra} images, from {manifest.extra_source}")
    if manifest.chosen_from:
        _show(f"  classes    {manifest.num_classes} chosen from {len(manifest.chosen_from)}")
    _show(f"  written    {manifest.written_at} with {', '.join(f'{n} {v}' for n, v in manifest.versions.items())}")
    _show(f"  images     {manifest.num_samples} in {manifest.num_classes} classes, {manifest.file_size / 1e6:.1f} MB")
    _show(f"  stored as  {stored}")
    for side in ("height", "width"):
        values = samples[side]
        _show(f"  {side:<10} {values.min()} to {values.max()}, median {int(np.median(values))} pixels")
    _print_readings(manifest)
    _show(f"  skipped    {len(manifest.skipped)}")
    for image in manifest.skipped:
        _show(f"    {image.path}: {image.reason}")
    _show(f"  sha256     {manifest.sha256}")
    _show(f"  content    {manifest.content_sha256} (equal for every rebuild from the same images)")
    _show("  images per class:")
    for name, count in zip(manifest.class_names, manifest.label_histogram, strict=True):
        _show(f"    {count:>8} {name}")


def _show(line: str, stream: TextIO | None = None) -> None:
    """Names in a manifest may be a stranger's."""
    print(printable_line(line), file=stream)


def _print_readings(manifest: Manifest) -> None:
    """Print which images were converted, and which files were passed over."""
    if manifest.converted:
        behind = f"; transparent pixels are {manifest.background}" if "alpha" in manifest.converted else ""
        _show(f"  converted  {_counts(manifest.converted)}{behind if manifest.background else ''}")
    if manifest.passed_over:
        heif = {".heic", ".heif"} & set(manifest.passed_over)
        _show(f"  passed over {_counts(manifest.passed_over)}{'; pip install pillow-heif reads HEIC' if heif else ''}")


def _files_not_as_published(manifest: Manifest) -> list[str]:
    return [name for name, published in manifest.authors_md5.items() if not published]


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{number} {name}" for name, number in counts.items())
