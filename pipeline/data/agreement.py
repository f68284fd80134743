"""What the two data files and a recipe must agree on before anything starts. numpy only: no torch, no ffcv.

`run`, `resume`, `evaluate` and every worker check the same: the files are whole, one is the training set and the other
the test set of the same classes in the same order, and the recipe's numbers fit them.
"""

from __future__ import annotations

import os
from pathlib import Path

from pipeline.data.loading import sampling
from pipeline.data.manifest import DataError, Manifest, check_structure, open_checked, read_index
from pipeline.data.sources.source import name_list
from pipeline.recipe.schema import Recipe

SPLIT_OF = {"data.train_file": "train", "data.test_file": "test"}
"""Recipe key -> the split that its file must hold."""


def check_data_files(recipe: Recipe) -> dict[str, Manifest]:
    """The manifests of the two data files, by recipe key, once they agree with each other and with the recipe.

    Reads both files' index and nothing of the images. Errors: DataError naming the key, the file and the fix.
    """
    manifests = open_data_files(recipe)
    check_agreement(recipe, manifests)
    return manifests


def open_data_files(recipe: Recipe) -> dict[str, Manifest]:
    """The manifests of the two data files, by recipe key. Errors: DataError for a file that is missing or damaged."""
    return {key: _open(recipe, key, _path_of(recipe, key)) for key in SPLIT_OF}


def _path_of(recipe: Recipe, key: str) -> Path:
    return Path(recipe.data.train_file if key == "data.train_file" else recipe.data.test_file)


def _open(recipe: Recipe, key: str, path: Path) -> Manifest:
    if not path.exists():
        source = " --source DIR" if recipe.data.dataset in ("image_folder", "imagenet") else ""
        raise DataError(
            f"{key} = {path} does not exist; write it with: "
            f"python -m launch data write {recipe.data.dataset}{source} --out {path.parent}"
        )
    return open_checked(path)


def check_agreement(recipe: Recipe, manifests: dict[str, Manifest]) -> None:
    """Errors: DataError naming the first thing that does not agree, and the fix."""
    for key, manifest in manifests.items():
        if manifest.dataset != recipe.data.dataset:
            raise DataError(
                f"{key} = {_path_of(recipe, key)} holds {manifest.dataset}, but data.dataset is {recipe.data.dataset}; "
                f"set data.dataset={manifest.dataset}, or name another file"
            )
    _check_splits(recipe, manifests)
    _check_classes(recipe, manifests)
    try:
        _check_sizes(recipe, manifests["data.train_file"])
    except ValueError as error:
        raise DataError(f"data.train_file = {recipe.data.train_file}: {error}") from None


def _check_splits(recipe: Recipe, manifests: dict[str, Manifest]) -> None:
    train, test = (_path_of(recipe, key) for key in SPLIT_OF)
    same = manifests["data.train_file"].content_sha256 == manifests["data.test_file"].content_sha256
    if same or os.path.samefile(train, test):
        raise DataError(
            f"data.train_file = {train} and data.test_file = {test} hold the same images, so the test would be of "
            "what was trained on; name the test set's file"
        )
    wrong = {key: manifest.split for key, manifest in manifests.items() if manifest.split != SPLIT_OF[key]}
    if len(wrong) == len(SPLIT_OF):
        raise DataError(f"data.train_file = {train} and data.test_file = {test} are swapped; exchange them")
    for key, split in wrong.items():
        raise DataError(f"{key} = {_path_of(recipe, key)} holds the {split} split; name a file of {SPLIT_OF[key]}")


def _check_classes(recipe: Recipe, manifests: dict[str, Manifest]) -> None:
    train, test = (manifests[key].class_names for key in SPLIT_OF)
    files = f"data.train_file = {recipe.data.train_file} and data.test_file = {recipe.data.test_file}"
    if set(train) != set(test):
        raise DataError(
            f"{files} have {len(train)} and {len(test)} classes; only in the first: "
            f"{name_list([name for name in train if name not in set(test)])}; only in the second: "
            f"{name_list([name for name in test if name not in set(train)])}; write both with the same classes"
        )
    if train != test:
        label = next(i for i, pair in enumerate(zip(train, test, strict=True)) if pair[0] != pair[1])
        raise DataError(
            f"{files} have the same classes in another order: label {label} is {train[label]} in the first and "
            f"{test[label]} in the second; write both with the same --classes"
        )
    if len(train) != recipe.model.num_classes:
        raise DataError(
            f"model.num_classes {recipe.model.num_classes}: {recipe.data.train_file} has {len(train)} classes; set "
            f"model.num_classes={len(train)}"
        )


def _check_sizes(recipe: Recipe, train: Manifest) -> None:
    """Errors: ValueError, those of `sampling` that a stage would begin with."""
    data = recipe.data
    if data.extra_fraction is not None and train.num_extra == 0:
        raise ValueError(
            f"data.extra_fraction = {data.extra_fraction}, and the file has no extra images; write it again with "
            "--extra FILE, or leave the key out"
        )
    left = sampling.num_train_images(train.num_samples - train.num_extra, data.validation_images, data.train_images)
    sampling.steps_per_epoch(left, recipe.batch.batch_per_step, recipe.extra_per_step)
    samples = read_index(data.train_file, check_structure(data.train_file)).samples
    sampling.training_crops(data.augmentation, samples["height"], samples["width"], data.image_size, recipe.seed)
