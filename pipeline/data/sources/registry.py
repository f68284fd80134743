"""The supported data sets: lists one split of any of them.

Sample i of a `Source` is always the same image: files of a folder are sorted by class and then by name; images of a
file of many keep its order. `pipeline.data.sources.decode` says how an image file is decoded.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pipeline.data.manifest import DataError
from pipeline.data.sources.cifar import LAYOUTS, cifar
from pipeline.data.sources.extra_images import add_extra
from pipeline.data.sources.fashion_mnist import fashion_mnist, find_fashion_mnist
from pipeline.data.sources.image_folder import AS_PUBLISHED, FOLDERS, FolderOptions, image_folder
from pipeline.data.sources.imagenet import imagenet
from pipeline.data.sources.source import SPLITS, Source, choose_classes
from pipeline.data.sources.svhn import svhn
from pipeline.recipe.sections import DATASETS


def open_source(
    dataset: str,
    split: str,
    source: Path | None,
    classes: Sequence[str] = (),
    extra: Path | None = None,
    folder: FolderOptions = AS_PUBLISHED,
) -> Source:
    """List one split; `source` may be None for data sets that can be downloaded.

    `classes` keeps only these classes and numbers them in the given order; empty means all. The images of the file
    `extra` follow the training images. `folder` is for image_folder: the pixels of data sets that others published are
    kept as they are. Errors: DataError naming the file or folder and the fix.
    """
    if split not in SPLITS:
        raise DataError(f"split {split!r} is not one of {', '.join(SPLITS)}")
    if folder != AS_PUBLISHED and dataset != "image_folder":
        raise DataError(
            f"--background, --exif-rotate and --val-fraction are for image_folder; {dataset} keeps its authors' pixels "
            "and splits"
        )
    try:
        images = _open_all_classes(dataset, split, source, folder)
        if extra is not None and split == "train":
            images = add_extra(images, extra)
    except OSError as error:
        raise DataError(f"{error.filename or source or dataset} cannot be read: {error.strerror or error}") from None
    return choose_classes(images, classes) if classes else images


def _open_all_classes(dataset: str, split: str, source: Path | None, folder: FolderOptions) -> Source:
    if dataset == "fashion_mnist":
        return fashion_mnist(find_fashion_mnist(source), split)
    if dataset in LAYOUTS:
        return cifar(dataset, split, source)
    if dataset == "svhn":
        return svhn(split, source)
    if dataset == "imagenet" and not (source is not None and (source / FOLDERS["train"]).is_dir()):
        return imagenet(split, source)
    if dataset == "imagenet":
        return image_folder(dataset, source, split, AS_PUBLISHED)
    if dataset == "image_folder":
        return image_folder(dataset, source, split, folder)
    raise DataError(f"data set {dataset!r} is not one of {', '.join(DATASETS)}")
