"""Image files of a folder that a list names, through torchvision's preprocessing: what ImageNet's leaderboards judge.

RobustBench (Croce et al., NeurIPS 2021 Datasets and Benchmarks; its `data.py`, "Res256Crop224", and `loaders.py`) reads
5,000 validation images by the list `helper_files/imagenet_test_image_ids.txt`: one `<WordNet id>/<file>` per line.
An image becomes RGB by Pillow, its shorter side 256 pixels by torchvision's Resize (bilinear, antialiased), and the
central 224 x 224 of that. An FFCV file holds other pixels, and resizes by area.
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
from torchvision.transforms import CenterCrop, Compose, Resize

from pipeline.data.loading.loader import Batch
from pipeline.data.loading.prefetch import Prefetch, mapped
from pipeline.data.manifest import DataError
from pipeline.data.sources.decode import BrokenImage, read_image
from pipeline.data.sources.source import some
from pipeline.run.files import sha256_of

RESIZED, CROPPED = 256, 224
PREPROCESSING = f"torchvision, resize {RESIZED}, centre crop {CROPPED}"
_PREPARE = Compose([Resize(RESIZED), CenterCrop(CROPPED)])
AHEAD = 4
FILE_DEADLINE_S = 100.0
"""How long one file may take, the list too. Less than a batch may, whose error does not name the file."""

Result = TypeVar("Result")


class ListedImages:
    """The images `folder`/<class>/<file> that `list_file` names, in its order; read by `threads` threads.

    A sample's id is its line's number, from 0; its label is the place of its class in `class_names`. It can be judged
    like an FFCV file (`data.loader.Loader`): it has `num_samples` and `labels` int64 [num_samples], and gives batches.

    Errors: DataError for a list that names a class that is not there, a file that is missing or cannot be looked at,
    or a line twice; LoaderError for a list or a folder that does not answer within FILE_DEADLINE_S.
    """

    def __init__(self, folder: Path, list_file: Path, class_names: Iterable[str], *, threads: int) -> None:
        self.path = folder
        self.names = _read_list(list_file)
        label_of = {name: label for label, name in enumerate(class_names)}
        unknown = [name for name in self.names if name.split("/")[0] not in label_of]
        if unknown:
            raise DataError(f"{list_file} names classes that the network was not trained on: {some(unknown)}")
        self._threads = threads
        found = self._each(Path.is_file, self.names)
        missing = [name for name, there in zip(self.names, found, strict=True) if not there]
        if missing:
            raise DataError(
                f"{folder} lacks {len(missing)} of the {len(self.names)} images that {list_file} names: "
                f"{some(missing)}; give the folder that holds one folder per class"
            )
        self.labels = np.array([label_of[name.split("/")[0]] for name in self.names], np.int64)
        self.num_samples = len(self.names)

    def __enter__(self) -> ListedImages:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing is open, unlike in a Loader: its threads end with what they were asked."""

    def _each(self, function: Callable[[Path], Result], names: Iterable[str]) -> Generator[Result]:
        """function(path) of each name, in order. Errors: DataError or LoaderError naming the file."""

        def asked(path: Path) -> Result:
            try:
                return function(path)
            except (OSError, BrokenImage) as error:
                raise DataError(f"{path} cannot be read: {error}") from None

        paths = [self.path / name for name in names]
        return mapped(asked, paths, threads=self._threads, deadline_s=FILE_DEADLINE_S)

    @functools.cached_property
    def identity(self) -> dict[str, str]:
        """What tells these images, and how they are prepared, from all others. Reads every file once.

        Errors: DataError, LoaderError naming a file that cannot be read, or not within FILE_DEADLINE_S.
        """
        digest = hashlib.sha256()
        for name, content in zip(self.names, self._each(sha256_of, self.names), strict=True):
            digest.update(f"{name}\0{content}\n".encode())
        return {
            "data_sha256": digest.hexdigest(),
            "preprocessing": PREPROCESSING,
            "image_list_sha256": list_sha256(self.names),
        }

    def read(self, ids: NDArray[np.int64]) -> Batch:
        """Images `ids` [n], now.

        Errors: DataError naming a file that cannot be read or decoded; LoaderError naming one that cannot be within
        FILE_DEADLINE_S.
        """
        images = torch.from_numpy(np.stack(list(self._each(_prepared, [self.names[i] for i in ids.tolist()]))))
        return Batch(images.permute(0, 3, 1, 2), torch.from_numpy(self.labels[ids]), torch.from_numpy(ids.copy()))

    def batches(self, plan: Iterable[tuple[NDArray[np.int64], object]], deadline_s: float = 120.0) -> Generator[Batch]:
        """Batches of (ids, crops), ahead of their use and in order. The crops are not looked at: there is one only.

        Errors: those of `read`; LoaderError if a batch takes longer than `deadline_s` seconds.
        """
        prefetch = Prefetch((self.read(ids) for ids, _ in plan), AHEAD, str(self.path))
        try:
            while (batch := prefetch.next(deadline_s)) is not None:
                yield batch
        finally:
            prefetch.stop()


def _prepared(path: Path) -> NDArray[np.uint8]:
    """uint8 [224, 224, 3]. ToTensor divides these by 255, as everything here does."""
    pixels, _ = read_image(path)
    return np.asarray(_PREPARE(Image.fromarray(pixels)))


def list_sha256(names: Iterable[str]) -> str:
    """Hash of a list's lines, whatever ends them."""
    return hashlib.sha256("\n".join(names).encode()).hexdigest()


def _read_list(path: Path) -> list[str]:
    read = functools.partial(Path.read_text, encoding="utf-8")
    try:
        (text,) = mapped(read, [path], threads=1, deadline_s=FILE_DEADLINE_S)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from None
    names = [line.strip() for line in text.splitlines() if line.strip()]
    odd = [name for name in names if len(parts := name.split("/")) != 2 or {"", ".", ".."} & set(parts)]
    if odd or not names:
        raise DataError(f"{path}: expected <class>/<file> in every line, found {some(odd)}")
    if twice := [name for name, times in Counter(names).items() if times > 1]:
        raise DataError(f"{path} names images twice: {some(twice)}")
    return names
