"""Chosen classes, and extra images after a data set's own: listed, written to real files, and loaded in batches."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest

from launch.commands import data as commands
from pipeline.data.loading import sampling
from pipeline.data.loading.loader import Loader
from pipeline.data.manifest import DataError, open_checked
from pipeline.data.sources import registry
from pipeline.data.sources.registry import open_source
from pipeline.recipe.sections import DATASETS
from tests.support.synthetic_data import CIFAR10_NAMES, cifar_files, write_svhn
from tests.unit.data.test_write import launch_data, stored

EXTRA = 30


@pytest.fixture
def batches(tmp_path: Path) -> Path:
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name, data in cifar_files("cifar10", np.random.default_rng(0), 40).items():
        (folder / name).write_bytes(data)
    return folder


def write_extra_images(path: Path, labels: np.ndarray, side: int = 32) -> np.ndarray:
    """Write a file in Carmon et al.'s format, or in Gowal et al.'s if its suffix is .npz; returns its images."""
    images = np.random.default_rng(5).integers(0, 256, (len(labels), side, side, 3), dtype=np.uint8)
    if path.suffix == ".npz":
        np.savez(path, image=images, label=labels)
    else:
        contents = {"data": images, "extrapolated_targets": labels, "prediction_model": "a/path", "epoch": 200}
        path.write_bytes(pickle.dumps(contents, 3))
    return images


def test_classes_are_numbered_in_the_order_of_their_names_in_the_choice(batches: Path) -> None:
    whole = open_source("cifar10", "train", batches)
    names = ["ship", "cat", "airplane"]
    subset = open_source("cifar10", "train", batches, names)
    indices = [i for i in range(200) if whole.class_names[whole.labels[i]] in names]
    assert subset.class_names == tuple(names)
    assert subset.chosen_from == CIFAR10_NAMES
    assert [names[label] for label in subset.labels] == [whole.class_names[whole.labels[i]] for i in indices]
    assert subset.names == [whole.names[i] for i in indices]
    for n, i in enumerate(indices):
        np.testing.assert_array_equal(subset.read(n)[0], whole.read(i)[0])
    hashes = [open_source("cifar10", "train", batches, c).sha256 for c in ((), names, names[::-1], names[:2])]
    assert len(set(hashes)) == 4


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["cat", "lynx", "gnu"], r"cifar10 has no class lynx, gnu; it has airplane, automobile, "),
        (["cat"], r"--classes cat: name two or more different classes"),
        (["cat", "dog", "cat"], r"--classes cat,dog,cat: name two or more different classes"),
    ],
)
def test_invalid_choices_of_classes_are_refused(batches: Path, names: list[str], words: str) -> None:
    with pytest.raises(DataError, match=words):
        open_source("cifar10", "train", batches, names)


def test_a_chosen_class_must_have_images_of_its_own(batches: Path, tmp_path: Path) -> None:
    batch = {"data": np.zeros((2, 3072), np.uint8), "labels": [3, 5]}
    (batches / "test_batch").write_bytes(pickle.dumps(batch))
    assert len(open_source("cifar10", "test", batches, ["dog", "cat"]).labels) == 2
    with pytest.raises(DataError, match="the test split has no images of frog, ship"):
        open_source("cifar10", "test", batches, ["dog", "frog", "ship"])


@pytest.mark.parametrize("name", ["ti.pickle", "1m.npz"])
def test_extra_images_follow_the_training_images(batches: Path, tmp_path: Path, name: str) -> None:
    labels = np.arange(EXTRA) % 10
    images = write_extra_images(tmp_path / name, labels)
    own = open_source("cifar10", "train", batches)
    mixed = open_source("cifar10", "train", batches, extra=tmp_path / name)
    assert (mixed.num_extra, own.num_extra) == (EXTRA, 0)
    np.testing.assert_array_equal(mixed.labels, np.concatenate([own.labels, labels]))
    assert mixed.names[200:202] == [f"{name}[0]", f"{name}[1]"]
    for i in range(EXTRA):
        np.testing.assert_array_equal(mixed.read(200 + i)[0], images[i])
        np.testing.assert_array_equal(mixed.read(i)[0], own.read(i)[0])
    assert open_source("cifar10", "test", batches, extra=tmp_path / name).num_extra == 0

    two = open_source("cifar10", "train", batches, ["dog", "cat"], tmp_path / name)
    assert two.num_extra == EXTRA // 5
    assert two.labels[-two.num_extra :].tolist() == [1, 0] * 3
    np.testing.assert_array_equal(two.read(len(two.labels) - 2)[0], images[EXTRA - 7])
    write_extra_images(tmp_path / name, (labels + 1) % 10)
    assert open_source("cifar10", "train", batches, extra=tmp_path / name).sha256 != mixed.sha256


def test_svhns_own_extra_digits_are_a_file_of_extra_images(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name, count in (("train", 20), ("test", 10), ("extra", 13)):
        write_svhn(tmp_path / f"{name}_32x32.mat", rng, count)
    source = open_source("svhn", "train", tmp_path, extra=tmp_path / "extra_32x32.mat")
    assert source.num_extra == 13
    assert source.labels[20:].tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1, 2, 3]


def test_invalid_extra_files_are_named(batches: Path, tmp_path: Path) -> None:
    def refusal(name: str) -> str:
        with pytest.raises(DataError) as caught:
            open_source("cifar10", "train", batches, extra=tmp_path / name)
        assert name in str(caught.value)
        return str(caught.value)

    assert "no such file" in refusal("absent.pickle")
    (tmp_path / "a.txt").touch()
    assert "expected a .pickle (data, extrapolated_targets), .npz (image, label) or .mat" in refusal("a.txt")
    for name in ("a.pickle", "a.npz"):
        write_extra_images(tmp_path / name, np.array([0, 10]))
        assert "label 10 of image 1 is not one of the 10 classes" in refusal(name)
        write_extra_images(tmp_path / name, np.array([0.0, 1.0]))
        assert "labels are float64 [2], expected integers [2]" in refusal(name)
        whole = (tmp_path / name).read_bytes()
        for length in (0, 10, len(whole) // 2, len(whole) - 1):
            (tmp_path / name).write_bytes(whole[:length])
            refusal(name)
    (tmp_path / "a.pickle").write_bytes(pickle.dumps({"extrapolated_targets": [1]}))
    assert "has no entry 'data', only extrapolated_targets" in refusal("a.pickle")
    np.savez(tmp_path / "a.npz", image=np.zeros((2, 32, 32), np.uint8), label=np.zeros(2, int))
    assert "images are uint8 [2, 32, 32], expected uint8 [n, any, any, 3]" in refusal("a.npz")
    np.savez(tmp_path / "a.npz", image=np.array([object()]), label=np.zeros(1, int))
    assert "allow_pickle=False" in refusal("a.npz")


@pytest.mark.slow
def test_a_choice_with_extra_images_is_written_and_loaded_in_the_given_share(
    batches: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Through the command line, FFCV and the loader: every micro-batch holds the images of the plan."""
    extra, out = tmp_path / "ti.pickle", tmp_path / "out"
    write_extra_images(extra, np.arange(EXTRA) % 10)
    names = tmp_path / "names.txt"
    names.write_text("truck\n\n  deer\nbird\n")
    command = ["write", "cifar10", "--source", str(batches), "--out", str(out), "--extra", str(extra)]
    assert launch_data(*command, "--classes", f"@{names}", "--workers", "2") == 0
    printed = capsys.readouterr()
    assert f"the last {3 * EXTRA // 10} images are extra, from {extra}" in printed.out
    assert "warning: data_batch_1 is not its authors' file" in printed.err

    source = open_source("cifar10", "train", batches, ["truck", "deer", "bird"], extra)
    pixels = np.stack([source.read(i)[0] for i in range(len(source.labels))])
    _, images, samples = stored(out / "train.beton")
    np.testing.assert_array_equal(samples["label"], source.labels)
    assert b"".join(images) == pixels.tobytes()
    manifest = open_checked(out / "train.beton")
    assert (manifest.num_extra, manifest.extra_source) == (9, str(extra.resolve()))
    assert (manifest.class_names, manifest.chosen_from) == (["truck", "deer", "bird"], list(CIFAR10_NAMES))
    assert manifest.authors_md5 == dict.fromkeys([*(f"data_batch_{n}" for n in range(1, 6)), "batches.meta"], False)
    assert (open_checked(out / "test.beton").num_extra, open_checked(out / "test.beton").num_classes) == (0, 3)

    assert launch_data("info", str(out / "train.beton")) == 0
    output = capsys.readouterr().out
    assert "3 chosen from 10" in output
    assert "not as published: data_batch_1, " in output
    assert launch_data(*command, "--classes", "truck,deer,bird") == 0
    assert capsys.readouterr().out.count("already written") == 2
    assert launch_data(*command, "--classes", "deer,truck,bird") == 2
    assert "with other class_names, source_sha256; --force" in capsys.readouterr().err
    assert launch_data(*command[:-2], "--classes", "truck,deer,bird") == 2
    assert "with other extra_source, source_sha256; --force" in capsys.readouterr().err

    with Loader(out / "train.beton", image_size=32, threads=1) as loader:
        assert (loader.num_samples, loader.num_extra) == (len(source.labels) - 9, 9)
        train, held_out = sampling.held_out(loader.num_samples, 5)
        assert max(train.max(), held_out.max()) < loader.num_samples
        per_epoch = sampling.steps_per_epoch(len(train), 8, extra_per_step=2)
        plan = sampling.training_plan(
            train,
            sampling.training_crops("none", loader.heights, loader.widths, 32, seed=0),
            seed=0,
            start_step=0,
            stop_step=per_epoch,
            batch_per_step=8,
            micro_batch=4,
            extra_ids=np.arange(loader.num_samples, loader.num_samples + loader.num_extra),
            extra_per_step=2,
        )
        count = 0
        for batch in loader.batches(plan):
            ids = batch.ids.numpy()
            assert (ids >= loader.num_samples).tolist() == [False, False, False, True]
            np.testing.assert_array_equal(batch.images.permute(0, 2, 3, 1).numpy(), pixels[ids])
            np.testing.assert_array_equal(batch.labels.numpy(), source.labels[ids])
            count += 1
        assert count == 2 * per_epoch > 0


@pytest.mark.parametrize("dataset", DATASETS)
def test_every_data_set_of_recipes_has_a_reader(tmp_path: Path, dataset: str) -> None:
    with pytest.raises(DataError) as error:
        registry.open_source(dataset, "train", tmp_path / "nowhere")
    assert "is not one of" not in str(error.value)


def test_a_list_of_classes_that_cannot_be_read_is_a_usage_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert commands.class_list("T-shirt/top,Bag") == ("T-shirt/top", "Bag")
    assert commands.class_list(None) == ()
    (tmp_path / "marked.txt").write_bytes("\ufeffcafé\r\ntea\r\n".encode())  # as Windows writes UTF-8
    assert commands.class_list(f"@{tmp_path}/marked.txt") == ("café", "tea")
    (tmp_path / "empty.txt").write_text("\n \n")
    for value in ("", ",", f"@{tmp_path}/empty.txt"):
        with pytest.raises(DataError, match=r"--classes .* names no class"):
            commands.class_list(value)
    out = tmp_path / "out"
    assert launch_data("write", "cifar10", "--classes", f"@{tmp_path}/nowhere.txt", "--out", str(out)) == 2
    assert "nowhere.txt: [Errno 2] No such file" in capsys.readouterr().err
    assert not out.exists()
