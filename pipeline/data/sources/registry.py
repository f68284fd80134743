"""Where images come from: the data sets there are, Fashion-MNIST's idx files, any tree with one folder per class.

A `Source` lists one split; sample i is always the same image: of a folder, files are sorted by class and then by name;
of a file of many images, they keep its order. What is decoded from a file, and how, is `pipeline.data.sources.decode`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pipeline.data.manifest import DataError
from pipeline.data.sources.cifar import LAYOUTS, cifar
from pipeline.data.sources.extra_images import add_extra
from pipeline.data.sources.fashion_mnist import fashion_mnist, find_fashion_mnist
from pipeline.data.sources.image_folder import FOLDERS, image_folder, image_root
from pipeline.data.sources.imagenet import imagenet
from pipeline.data.sources.source import SPLITS, Source, choose_classes
from pipeline.data.sources.svhn import svhn
from pipeline.recipe.sections import DATASETS


def open_source(
    dataset: str, split: str, source: Path | None, classes: Sequence[str] = (), extra: Path | None = None
) -> Source:
    """List one split; `source` may be None for data sets that can be had without.

    `classes` leaves the others out and numbers these in the order given; none means all. The images of the file
    `extra` come behind the training images. Errors: DataError naming the place and the fix.
    """
    if split not in SPLITS:
        raise DataError(f"split {split!r} is none of {', '.join(SPLITS)}")
    try:
        opened = _open_whole(dataset, split, source)
        if extra is not None and split == "train":
            opened = add_extra(opened, extra)
    except OSError as error:
        raise DataError(f"{error.filename or source or dataset} cannot be read: {error.strerror or error}") from None
    return choose_classes(opened, classes) if classes else opened


def _open_whole(dataset: str, split: str, source: Path | None) -> Source:
    if dataset == "fashion_mnist":
        return fashion_mnist(find_fashion_mnist(source), split)
    if dataset in LAYOUTS:
        return cifar(dataset, split, source)
    if dataset == "svhn":
        return svhn(split, source)
    if dataset == "imagenet" and not (source is not None and (source / FOLDERS["train"]).is_dir()):
        return imagenet(split, source)
    if dataset in ("image_folder", "imagenet"):
        return image_folder(dataset, image_root(source), split)
    raise DataError(f"data set {dataset!r} is none of {', '.join(DATASETS)}")
