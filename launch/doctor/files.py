"""What is read and written: images by FFCV, a recipe's data files and weights, disk space."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from launch import run_folder
from launch.doctor.outcome import Outcome, ProgressCallback, Subject
from launch.ray_cluster.scratch import scratch_parent
from pipeline.recipe.schema import Recipe
from pipeline.recipe.stages import stages_of
from pipeline.run.disk import free_bytes, readable

LITTLE_BYTES = 10**9
"""Less free space than this is a failure if no recipe says how much is needed."""
SIDE = 96
"""Of the image that is written: larger than those that are stored raw, so that it is a JPEG."""
LEVELS = (40, 200)
"""Grey of its upper and of its lower half."""
TOLERANCE = 4
"""Of JPEG, in grey levels of 256, away from the edge."""


def check_ffcv(subject: Subject, progress: ProgressCallback) -> Outcome:
    """Write a small data set of one image, and read it as a worker does."""
    from PIL import Image

    from pipeline.data.loading.loader import Loader
    from pipeline.data.loading.sampling import whole_image_crops
    from pipeline.data.writing.write import WriteOptions, write_dataset

    pixels = np.repeat(np.array(LEVELS, np.uint8), SIDE // 2)[:, None, None] * np.ones((1, SIDE, 3), np.uint8)
    with tempfile.TemporaryDirectory(prefix="doctor-", dir=scratch_parent()) as place:
        source = Path(place) / "source"
        for split in ("train", "val"):
            folder = source / split / "grey"
            folder.mkdir(parents=True)
            Image.fromarray(pixels).save(folder / "image.png")
        files = write_dataset(
            "image_folder", source, Path(place), WriteOptions(workers=1), False, lambda stage, done, total: None
        )
        with Loader(files[0].path, image_size=SIDE, threads=1) as loader:
            crops = whole_image_crops(loader.heights, loader.widths)
            image = loader.read(np.arange(1), crops).images[0].numpy()
    return compare_image(image)


def compare_image(image: NDArray[np.uint8]) -> Outcome:
    """Compare what was decoded, [3, SIDE, SIDE], with what was written."""
    rows = image[:, SIDE // 4].astype(int), image[:, 3 * SIDE // 4].astype(int)
    error = max(int(abs(row - level).max()) for row, level in zip(rows, LEVELS, strict=True))
    if error > TOLERANCE:
        return Outcome(
            "fail",
            f"a JPEG that FFCV has written and decoded differs by {error} of 255",
            "build FFCV again with this system's OpenCV and TurboJPEG: rm -rf .venv, make setup",
        )
    return Outcome("pass", f"an image of {SIDE} x {SIDE} pixels is written, and decoded as a worker does")


def check_disk(subject: Subject, progress: ProgressCallback) -> Outcome:
    """Space for checkpoints and networks where runs are; whether a file can be written there."""
    folder = Path(subject.run) if subject.run is not None else run_folder.RUNS.absolute()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    try:
        with tempfile.NamedTemporaryFile(dir=existing, prefix=".doctor-") as file:
            file.write(b"x")
            file.flush()
    except OSError as error:
        fix = "work in a folder in which you may write, on a disk with space"
        return Outcome("fail", f"{existing}: {error.strerror or error}", fix)
    free = free_bytes(folder)
    if free is None:
        return Outcome("pass", f"{existing} may be written; its file system does not say how much is free")
    needed = LITTLE_BYTES if subject.recipe is None else _needed_bytes(subject.recipe)
    text = f"{existing} has {readable(free)} free"
    if free < needed:
        return Outcome("fail", f"{text}, about {readable(needed)} are needed", "make room, or work on another disk")
    return Outcome("pass", text if subject.recipe is None else f"{text} of about {readable(needed)} needed")


def _needed_bytes(recipe: Recipe) -> int:
    """As `run --dry-run` estimates it; without perturbations if the data cannot be read, which another check says."""
    from pipeline.data.manifest import DataError, read_manifest

    stages = stages_of(recipe)
    try:
        images = run_folder.train_images(recipe, read_manifest(Path(recipe.data.train_file)))
    except DataError:
        images = 0
    remembered = [images * stage.objective.remembered_bytes(recipe.data.image_size) for stage in stages]
    return run_folder.disk_bytes(recipe, stages, run_folder.network_size(recipe), remembered)


def check_network(subject: Subject, progress: ProgressCallback) -> Outcome:
    """The recipe's network takes its images, and model.weights, if any, fit it."""
    recipe = subject.recipe
    assert recipe is not None
    size = run_folder.network_size(recipe)
    weights = "" if recipe.model.weights is None else f"; {recipe.model.weights} fits"
    return Outcome("pass", f"{recipe.model.arch}, {size:,} weights{weights}")


def check_data(subject: Subject, progress: ProgressCallback) -> Outcome:
    """Data files, complete or only their index, agree with their manifests, the recipe, and what a run began with."""
    from pipeline.data.manifest import open_checked
    from pipeline.data.writing.verify import page_hashes

    recipe = subject.recipe
    assert recipe is not None
    if subject.run is not None:
        run_folder.check_same_data(Path(subject.run))
    else:
        run_folder.check_data(recipe)
    files = [Path(recipe.data.train_file), Path(recipe.data.test_file)]
    if not subject.reads_files:
        return Outcome("pass", f"{_names(files)}: index and sizes (another node reads the images)")
    manifests = [open_checked(file) for file in files]
    done, total = 0, sum(len(manifest.pages) for manifest in manifests)
    for file, manifest in zip(files, manifests, strict=True):
        for number, (_, digest) in enumerate(page_hashes(file)):
            if digest != manifest.pages[number]:
                text = f"{file} is damaged: its {number + 1}. part of 8 MiB is not what was written"
                fix = f"python -m launch data verify {file} lists the images; write or copy it again"
                return Outcome("fail", text, fix)
            done += 1
            progress(done, total)
    size = readable(sum(manifest.file_size for manifest in manifests))
    return Outcome("pass", f"{_names(files)}: every byte is what was written ({size})")


def _names(files: list[Path]) -> str:
    return " and ".join(str(file) for file in files)
