"""The two data files and the recipe are compared before anything starts: splits, classes, counts."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launch import run_folder
from pipeline.data.agreement import check_data_files
from pipeline.data.manifest import DataError, manifest_path
from pipeline.recipe.schema import Recipe
from tests.support.small_recipe import small_recipe


@pytest.fixture
def data(fashion_data: Path, tmp_path: Path) -> Path:
    """Files of its own, as a test changes them."""
    shutil.copytree(fashion_data, tmp_path / "data", ignore=shutil.ignore_patterns("idx"))
    return tmp_path / "data"


def edit(file: Path, change: Callable[[dict[str, Any]], None]) -> None:
    values = json.loads(manifest_path(file).read_text())
    change(values)
    manifest_path(file).write_text(json.dumps(values))


def reverse_classes(values: dict[str, Any]) -> None:
    values["class_names"].reverse()


def add_class(values: dict[str, Any]) -> None:
    values["class_names"].append("Tie")
    values["label_histogram"].append(0)
    values["num_classes"] += 1


def rename_class(values: dict[str, Any]) -> None:
    values["class_names"][3] = "Frock"


def copy_file(source: Path, target: Path) -> None:
    shutil.copy(source, target)
    shutil.copy(manifest_path(source), manifest_path(target))


def test_files_that_agree(data: Path) -> None:
    recipe = small_recipe(data)
    manifests = check_data_files(recipe)
    assert {key: manifest.split for key, manifest in manifests.items()} == {
        "data.train_file": "train",
        "data.test_file": "test",
    }
    assert run_folder.check_data(recipe) == {key: manifest.sha256 for key, manifest in manifests.items()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (reverse_classes, r"the same classes in another order: label 0 is T-shirt/top in the first and Ankle boot in"),
        (add_class, r"have 10 and 11 classes; only in the first: none; only in the second: Tie; write both"),
        (rename_class, r"only in the first: Dress; only in the second: Frock"),
        (lambda values: values.update(split="train"), r"data\.test_file = .*test\.beton holds the train split"),
        (lambda values: values.update(dataset="cifar10"), r"data\.test_file = .*holds cifar10.*set data\.dataset="),
    ],
)
def test_files_that_disagree(change: Callable[[dict[str, Any]], None], message: str, data: Path) -> None:
    edit(data / "test.beton", change)
    for check in (check_data_files, run_folder.check_data):
        with pytest.raises(DataError, match=message):
            check(small_recipe(data))


def test_swapped_files(data: Path) -> None:
    recipe = small_recipe(data, data={"train_file": str(data / "test.beton"), "test_file": str(data / "train.beton")})
    with pytest.raises(DataError, match=r"data\.train_file = .*test\.beton and .*train\.beton are swapped"):
        check_data_files(recipe)


@pytest.mark.parametrize("way", ["link", "hard link", "copy", "rewritten"])
def test_one_file_under_two_names(way: str, data: Path) -> None:
    other = data / "other.beton"
    if way == "link":
        other.symlink_to("train.beton")
        manifest_path(other).symlink_to("train.beton.manifest.json")
    elif way == "hard link":
        os.link(data / "train.beton", other)
        os.link(manifest_path(data / "train.beton"), manifest_path(other))
    else:
        copy_file(data / "train.beton", other)
    if way == "rewritten":  # as if val/ were a copy of train/, in another order
        edit(other, lambda values: values.update(split="test", sha256="0"))
    with pytest.raises(DataError, match=r"train\.beton and .*other\.beton hold the same images"):
        check_data_files(small_recipe(data, data={"test_file": str(other)}))


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"model": {"num_classes": 7}}, r"model\.num_classes 7: .*has 10 classes; set model\.num_classes=10"),
        ({"data": {"validation_images": 3000}}, r"train\.beton: data\.validation_images 3000 leaves nothing to train"),
        ({"data": {"train_images": 2801}}, r"data\.train_images 2801: 2800 images are left"),
        ({"data": {"train_images": 63}}, r"batch\.batch_per_step 64 is more than the 63 training images"),
        ({"data": {"augmentation": "pad_crop", "image_size": 32}}, r"pad_crop needs images of data\.image_size 32"),
        ({"data": {"extra_fraction": "0.5"}}, r"data\.extra_fraction = 0.5, and the file has no extra images"),
    ],
)
def test_recipes_that_do_not_fit_the_files(sections: dict[str, Any], message: str, data: Path) -> None:
    recipe: Recipe = small_recipe(data, **sections)
    with pytest.raises(DataError, match=message):
        check_data_files(recipe)


def test_a_started_run_is_told_first_that_a_file_was_replaced(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = small_recipe(data)
    folder = run_folder.open_or_create(recipe, "mine", run_folder.check_data(recipe))
    copy_file(data / "test.beton", data / "train.beton")
    with pytest.raises(ValueError, match=r"data\.train_file was replaced after runs/mine was started"):
        run_folder.check_same_data(folder)


def test_weights_that_may_not_be_read(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = tmp_path / "weights.pt"
    weights.touch()

    def refuse(_: Path) -> str:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(run_folder, "sha256_of", refuse)  # root may read every file
    with pytest.raises(ValueError, match=r"model\.weights = .*weights\.pt cannot be read: Permission denied"):
        run_folder.check_data(small_recipe(data, model={"weights": str(weights)}))


def test_the_check_needs_no_torch() -> None:
    code = "import sys, pipeline.data.agreement; sys.exit(any(m in sys.modules for m in ('torch', 'ffcv', 'ray')))"
    assert subprocess.run([sys.executable, "-c", code], timeout=240, check=False).returncode == 0
