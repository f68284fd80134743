"""`predict`: the classes of image files, as the network's own preprocessing and logits give them."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from launch.__main__ import main
from pipeline.data.loading.loader import Loader
from pipeline.evaluation.images import EvaluationImages
from pipeline.evaluation.load import load_network
from pipeline.recipe.stages import stages_of
from pipeline.run.files import atomic_write_json, sha256_of
from tests.support.finished_run import write_finished_run
from tests.support.small_recipe import small_recipe
from tests.unit.report.test_report import evaluation


@pytest.fixture
def run(fashion_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A finished run on real data, whose sparsest HYDRA network is evaluated."""
    monkeypatch.chdir(tmp_path)
    recipe = small_recipe(fashion_data, sparsity={"keep_fractions": ["0.1", "0.05"], "baselines": ["magnitude"]})
    folder = write_finished_run(tmp_path / "runs" / "demo", recipe)
    file = folder / "keep-0.05" / "finetune" / "model.safetensors"
    file.with_name("evaluate").mkdir()
    right = np.arange(400) < 300
    atomic_write_json(file.with_name("evaluate") / "pgd.json", evaluation(right, right & False, sha256_of(file)))
    return folder


@pytest.fixture
def photos(fashion_data: Path, tmp_path: Path) -> tuple[list[Path], torch.Tensor]:
    """70 image files, and the tensors that an evaluation of the same images sees."""
    with Loader(fashion_data / "test.beton", image_size=28, threads=1, compiled=False) as loader:
        images, ids = EvaluationImages.all_of(loader, "none"), np.arange(70)
        x, _ = loader.read(ids, images.crops(ids)).to(torch.device("cpu"))
    files = [tmp_path / f"{n:02}.png" for n in range(70)]
    for file, image in zip(files, x, strict=True):
        Image.fromarray((255 * image[0]).round().byte().numpy()).save(file)
    return files, x


def rows_of(out: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.splitlines()]


def test_json_has_the_networks_own_probabilities(
    run: Path, photos: tuple[list[Path], torch.Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    """In two batches."""
    files, x = photos
    file = run / "pretrain" / "model.safetensors"
    assert main(["predict", "--json", str(file), *map(str, files)]) == 0
    rows = rows_of(capsys.readouterr().out)
    assert [row["file"] for row in rows] == list(map(str, files))
    network = load_network(file)
    with torch.no_grad():
        expected = network(x).softmax(dim=1)
    torch.testing.assert_close(torch.tensor([row["probabilities"] for row in rows]), expected)
    assert [row["label"] for row in rows] == expected.argmax(dim=1).tolist()
    assert [row["class"] for row in rows] == [network.class_names[row["label"]] for row in rows]
    assert all(row["probability"] == row["probabilities"][row["label"]] for row in rows)


def test_of_a_run_it_is_the_sparsest_hydra_network_and_its_accuracy(
    run: Path, photos: tuple[list[Path], torch.Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    files, x = photos
    assert main(["predict", "demo", *map(str, files[:2])]) == 0
    head, first, second, about = capsys.readouterr().out.splitlines()
    assert head.split() == ["image", "class", "probability"]
    network = load_network(run, 0.05)
    with torch.no_grad():
        shares = network(x[:2]).softmax(dim=1)
    for line, file, share in zip((first, second), files, shares, strict=False):
        name = network.class_names[int(share.argmax())]
        assert re.fullmatch(rf"{re.escape(str(file))} +{re.escape(name)} +{100 * share.max():.1f} %", line)
    assert about == (
        "runs/demo/keep-0.05/finetune/model.safetensors: clean accuracy 75.00 %, robust accuracy 0.00 % on 400 test "
        "images (PGD-20, linf eps 1/10)"
    )
    assert main(["predict", str(run / "pretrain" / "model.safetensors"), str(files[0])]) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith("; not evaluated here, so its accuracy is unknown")


def test_images_that_cannot_be_read_are_named_after_the_others(
    run: Path, photos: tuple[list[Path], torch.Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.png").write_text("no image")
    os.mkfifo(tmp_path / "fifo.png")
    strange = tmp_path / "\x1b[31m.png"
    strange.write_bytes(photos[0][0].read_bytes())
    names = ["text.png", "fifo.png", "none.png", str(photos[0][0]), str(strange), str(tmp_path)]
    assert main(["predict", "demo", *names]) == 2
    printed = capsys.readouterr()
    assert len(printed.out.splitlines()) == 1 + 2 + 1
    assert "\x1b" not in printed.out
    assert "\\x1b[31m.png" in printed.out
    assert printed.err == (
        "error: 4 of 6 images cannot be used:\n"
        "text.png cannot be read: not an image of any known format\n"
        "fifo.png is not an image file\n"
        "none.png cannot be read: No such file or directory\n"
        f"{tmp_path} is not an image file\n"
    )
    assert main(["predict", "--json", "demo", *(f"none-{n}.png" for n in range(12))]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.splitlines()[-1] == "and 2 more"


def test_what_is_no_network_is_refused(
    run: Path, photos: tuple[list[Path], torch.Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = str(photos[0][0])
    (tmp_path / "text.safetensors").write_text("no network")
    alone = run / "pretrain" / "model.safetensors"
    (tmp_path / "alone.safetensors").write_bytes(alone.read_bytes())
    (run / "keep-0.05" / "finetune" / "model.safetensors").write_bytes(alone.read_bytes())
    for target, message in (
        ("nowhere", "nowhere: no such run; runs here: demo"),
        ("nowhere.safetensors", "nowhere.safetensors does not exist"),
        ("text.safetensors", "text.safetensors is damaged or was not written by this project"),
        ("alone.safetensors", "alone.safetensors does not say how images are prepared"),
        ("demo", "is not the network that the stage exported"),
    ):
        assert main(["predict", target, image]) == 2
        printed = capsys.readouterr()
        assert message in printed.err
        assert printed.out == ""
    for stage in stages_of(small_recipe(tmp_path, sparsity={"keep_fractions": ["0.1", "0.05"]})):
        (run / stage.name / "result.json").unlink(missing_ok=True)
    assert main(["predict", "demo", image]) == 2
    assert "has no finished network yet; continue with: python -m launch resume" in capsys.readouterr().err
