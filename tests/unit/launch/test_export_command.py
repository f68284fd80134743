"""`export`: the files of a run's network, and what is refused."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from launch.__main__ import main
from pipeline.deployment.calibration import BATCH, IMAGES, calibration_batches
from pipeline.deployment.onnx_file import logits_of
from pipeline.evaluation.load import load_network
from pipeline.models import build_network
from pipeline.models.export import METADATA_KEY, write_model
from pipeline.models.state import effective_state
from pipeline.recipe.file import dump_recipe, load_recipe
from pipeline.recipe.stages import stages_of
from pipeline.run.files import atomic_write_json, sha256_of
from tests.support.small_recipe import small_recipe


@pytest.fixture
def run(fashion_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A finished run on real data."""
    monkeypatch.chdir(tmp_path)
    recipe = small_recipe(fashion_data, sparsity={"keep_fractions": ["0.1"], "baselines": ["magnitude"]})
    folder = tmp_path / "runs" / "demo"
    for seed, stage in enumerate(stages_of(recipe)):
        (folder / stage.name).mkdir(parents=True)
        file = folder / stage.name / "model.safetensors"
        state = effective_state(build_network(recipe.model, seed, recipe.data.image_size))
        write_model(file, state, recipe.model, {"image_size": 28, "class_names": ["shirt"]})
        atomic_write_json(file.with_name("result.json"), {"model_sha256": sha256_of(file)})
    (folder / "recipe.yaml").write_text(dump_recipe(recipe))
    return folder


def test_a_runs_network_is_exported_in_every_format(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "demo", "--keep", "0.1"]) == 0
    out = capsys.readouterr().out
    folder = run / "keep-0.1" / "finetune" / "export"
    names = ["model.onnx", "model-int8.onnx", "model.pt2"]
    assert sorted(path.name for path in folder.iterdir()) == sorted([*names, *(f"{name}.gz" for name in names)])
    for name in names:
        whole, packed = (folder / name).read_bytes(), (folder / f"{name}.gz").read_bytes()
        assert gzip.decompress(packed) == whole
        assert re.search(rf"{name} +{len(whole):,} +{len(packed):,} ", out), out
    network = load_network(run, "0.1")
    images = torch.rand(4, 3, 28, 28)
    with torch.inference_mode():
        expected = network(images).numpy()
    np.testing.assert_allclose(logits_of(folder / "model.onnx", images.numpy()), expected, atol=1e-5)
    facts = {prop.key: json.loads(prop.value) for prop in onnx.load(folder / "model.onnx").metadata_props}
    assert facts == {METADATA_KEY: network.metadata}


def test_int8_alone_keeps_an_earlier_float_file(run: Path, tmp_path: Path) -> None:
    """It is made from a float file, but not from one that is there."""
    out = tmp_path / "files"
    out.mkdir()
    (out / "model.onnx").write_text("mine")
    command = ["export", "demo", "--keep", "0.1", "--method", "magnitude", "--format", "onnx-int8", "--out", str(out)]
    assert main(command) == 0
    assert sorted(path.name for path in out.iterdir()) == ["model-int8.onnx", "model-int8.onnx.gz", "model.onnx"]
    assert (out / "model.onnx").read_text() == "mine"


def test_calibration_takes_held_out_images_and_their_adversarial_examples(run: Path, fashion_data: Path) -> None:
    recipe = load_recipe(run / "recipe.yaml")
    assert recipe.threat_model is not None
    network = load_network(run, "0.1")
    batches = list(calibration_batches(network, recipe))
    held_out = min(recipe.data.validation_images, IMAGES)
    assert sum(map(len, batches)) == 2 * held_out
    assert len(batches[0]) == BATCH
    for clean, adversarial in zip(batches[::2], batches[1::2], strict=True):
        distance = np.abs(adversarial - clean).max()
        assert 0 < distance <= float(recipe.threat_model.eps) + 1e-6


def test_a_file_outside_a_run_has_no_images_for_int8(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "alone.safetensors"
    file.write_bytes((run / "pretrain" / "model.safetensors").read_bytes())
    assert main(["export", str(file)]) == 2
    assert "alone.safetensors is not inside a run" in capsys.readouterr().err
    assert main(["export", str(file), "--format", "onnx", "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "model.onnx").is_file()
