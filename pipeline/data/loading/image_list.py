"""Listed image files with torchvision's preprocessing: the images on which ImageNet's leaderboards evaluate.

RobustBench (Croce et al., NeurIPS 2021 Datasets and Benchmarks; its `data.py`, "Res256Crop224", and `loaders.py`) reads
5,000 validation images by the list `helper_files/imagenet_test_image_ids.txt`: one `<WordNet id>/<file>` per line.
Pillow converts an image to RGB, torchvision's Resize (bilinear, antialiased) brings its shorter side to 256 pixels, and
the central 224 x 224 are kept. An FFCV file would give other pixels: it stores them reduced, and resizes by area.
"""

from __future__ import annotations

import functools
import hashlib
from collections import Counter
from collections.abc import Callable, Generator, Iterable
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from pipeline.data.loading.loader import Batch
from pipeline.data.loading.prefetch import Prefetch, map_in_threads
from pipeline.data.manifest import DataError
from pipeline.data.sources.decode import BrokenImage, read_image
from pipeline.data.sources.source import name_list
from pipeline.run.files import sha256_of

RESIZED, CROPPED = 256, 224
PREPROCESSING = f"torchvision, resize {RESIZED}, centre crop {CROPPED}"
AHEAD = 4
FILE_DEADLINE_S = 100.0
"""How long reading one file, or the list, may take: less than a batch, as a batch's error does not name the file."""

Result = TypeVar("Result")


class ListedImages:
    """The images `folder`/<class>/<file> that `list_file` names, in its order; read by `threads` threads.

    A sample's id is its line's number, from 0; its label is the index of its class in `class_names`. Can be evaluated
    like an FFCV file (`loading.loader.Loader`): has `num_samples` and `labels` int64 [num_samples], and yields batches.

    Errors: DataError for a list that names an unknown class, a file that is missing or inaccessible, or an image twice;
    LoaderError if the list or the folder cannot be read within FILE_DEADLINE_S.
    """

    def __init__(self, folder: Path, list_file: Path, class_names: Iterable[str], *, threads: int) -> None:
        self.path = folder
        self.names = _read_list(list_file)
        label_of = {name: label for label, name in enumerate(class_names)}
        unknown = [name for name in self.names if name.split("/")[0] not in label_of]
        if unknown:
            raise DataError(f"{list_file} names classes that the network was not trained on: {name_list(unknown)}")
        self._threads = threads
        are_files = self._map_files(Path.is_file, self.names)
        missing = [name for name, is_file in zip(self.names, are_files, strict=True) if not is_file]
        if missing:
            raise DataError(
                f"{folder} lacks {len(missing)} of the {len(self.names)} images that {list_file} names: "
                f"{name_list(missing)}; give the folder that holds one folder per class"
            )
        self.labels = np.array([label_of[name.split("/")[0]] for name in self.names], np.int64)
        self.num_samples = len(self.names)

    def __enter__(self) -> ListedImages:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing to close, unlike a Loader: its threads end with each call."""

    def _map_files(self, function: Callable[[Path], Result], names: Iterable[str]) -> Generator[Result]:
        """function(path) of each name, in order. Errors: DataError or LoaderError naming the file."""

        def call(path: Path) -> Result:
            try:
                return function(path)
            except (OSError, BrokenImage) as error:
                raise DataError(f"{path} cannot be read: {error}") from None

        paths = [self.path / name for name in names]
        return map_in_threads(call, paths, threads=self._threads, deadline_s=FILE_DEADLINE_S)

    @functools.cached_property
    def identity(self) -> dict[str, str]:
        """Digests of the images and of their list, and the preprocessing. Reads every file once.

        Errors: DataError naming a file that cannot be read; LoaderError naming one that is not read within
        FILE_DEADLINE_S.
        """
        digest = hashlib.sha256()
        for name, content in zip(self.names, self._map_files(sha256_of, self.names), strict=True):
            digest.update(f"{name}\0{content}\n".encode())
        return {
            "data_sha256": digest.hexdigest(),
            "preprocessing": PREPROCESSING,
            "image_list_sha256": list_sha256(self.names),
        }

    def read(self, ids: NDArray[np.int64]) -> Batch:
        """Read images `ids` [n].

        Errors: DataError naming a file that cannot be read or decoded; LoaderError naming one that takes longer than
        FILE_DEADLINE_S.
        """
        images = torch.from_numpy(np.stack(list(self._map_files(_preprocess, [self.names[i] for i in ids.tolist()]))))
        return Batch(images.permute(0, 3, 1, 2), torch.from_numpy(self.labels[ids]), torch.from_numpy(ids.copy()))

    def batches(self, plan: Iterable[tuple[NDArray[np.int64], object]], deadline_s: float = 120.0) -> Generator[Batch]:
        """Yield the batches of (ids, crops) in order, read ahead of their use. Crops are ignored: there is only one.

        Errors: those of `read`; LoaderError if a batch takes longer than `deadline_s` seconds.
        """
        prefetch = Prefetch((self.read(ids) for ids, _ in plan), AHEAD, str(self.path))
        try:
            while (batch := prefetch.next(deadline_s)) is not None:
                yield batch
        finally:
            prefetch.stop()


def _preprocess(path: Path) -> NDArray[np.uint8]:
    """uint8 [224, 224, 3]. torchvision's ToTensor would divide by 255; here `Batch.to` does.

    Errors: OSError; BrokenImage, also for an image so narrow that it would be enlarged beyond Pillow's limit of pixels.
    """
    pixels, _ = read_image(path)
    shorter, longer = sorted(pixels.shape[:2])
    if Image.MAX_IMAGE_PIXELS is not None and RESIZED**2 * longer > Image.MAX_IMAGE_PIXELS * shorter:
        raise BrokenImage(f"{pixels.shape[0]} x {pixels.shape[1]} pixels are too narrow to be resized")
    return np.asarray(_resize_and_crop()(Image.fromarray(pixels)))


@functools.cache
def _resize_and_crop() -> Callable[[Image.Image], Image.Image]:
    from torchvision.transforms import CenterCrop, Compose, Resize  # takes seconds to import

    return Compose([Resize(RESIZED), CenterCrop(CROPPED)])


def list_sha256(names: Iterable[str]) -> str:
    """Hash of a list's lines, independent of line endings."""
    return hashlib.sha256("\n".join(names).encode()).hexdigest()


def _read_list(path: Path) -> list[str]:
    read = functools.partial(Path.read_text, encoding="utf-8-sig")
    try:
        (text,) = map_in_threads(read, [path], threads=1, deadline_s=FILE_DEADLINE_S)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from None
    names = [line.strip() for line in text.splitlines() if line.strip()]
    invalid = [name for name in names if len(parts := name.split("/")) != 2 or {"", ".", ".."} & set(parts)]
    if invalid or not names:
        raise DataError(f"{path}: expected <class>/<file> in every line, found {name_list(invalid)}")
    if duplicates := [name for name, count in Counter(names).items() if count > 1]:
        raise DataError(f"{path} names images twice: {name_list(duplicates)}")
    return names
