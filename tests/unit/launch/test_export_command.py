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
from launch.run_folder import check_data
from pipeline.deployment.calibration import BATCH, IMAGES, calibration_batches
from pipeline.deployment.card import Card
from pipeline.deployment.onnx_file import logits_of
from pipeline.evaluation.chunks import read_verdicts
from pipeline.evaluation.load import load_network
from pipeline.models.export import METADATA_KEY
from pipeline.recipe.file import load_recipe
from pipeline.run.benchmark import Benchmark, BenchmarkEntry, Speed, Spread
from pipeline.run.files import atomic_write_json, sha256_of
from tests.support.finished_run import write_finished_run
from tests.support.small_recipe import small_recipe


@pytest.fixture
def run(fashion_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A finished run on real data."""
    monkeypatch.chdir(tmp_path)
    recipe = small_recipe(fashion_data, sparsity={"keep_fractions": ["0.1"], "baselines": ["magnitude"]})
    folder = write_finished_run(tmp_path / "runs" / "demo", recipe, class_names=["shirt"])
    atomic_write_json(folder / "provenance.json", {"data_sha256": check_data(recipe)})
    return folder


def test_a_runs_network_is_exported_in_every_format(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["export", "demo", "--keep", "0.1", "--attack", "reduced", "--images", "60"]
    assert main(command) == 0
    out = capsys.readouterr().out
    folder = run / "keep-0.1" / "finetune" / "export"
    names = ["model.onnx", "model-int8.onnx", "model.pt2"]
    others = {"README.md", "card.json", "check.npz", "verdicts.parquet"}
    assert {path.name for path in folder.iterdir()} == {*names, *(f"{name}.gz" for name in names), *others}
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
    check_card(folder, out)
    attack = Card.read(folder / "card.json").attack
    assert main([*command[:4], "--format", "onnx-int8", "--attack", "reduced", "--images", "60"]) == 0
    assert Card.read(folder / "card.json").attack == attack
    assert main(["verify", str(folder)]) == 0
    claim_more(folder)
    capsys.readouterr()
    assert main(["verify", str(folder)]) == 1
    assert "card.json says robust_correct" in capsys.readouterr().err


def test_the_card_has_the_speeds_that_were_measured_of_this_network(run: Path) -> None:
    """And not those of another network of the run."""
    seconds = Spread(median=0.004, low=0.003, high=0.01)
    speeds = tuple(
        Speed(batch=batch, threads=1, rounds=9, seconds=seconds, times_as_fast=Spread(median=3.0, low=2.0, high=4.0))
        for batch in (1, 32)
    )
    dense = BenchmarkEntry(
        network="dense",
        model_sha256=sha256_of(run / "pretrain" / "model.safetensors"),
        file="model.onnx",
        sha256="0",
        runtime="onnxruntime",
        precision="float32",
        size=4000,
        compressed=4000,
        times_smaller=1.0,
        parameters=1000,
        kept_parameters=1000,
        multiply_accumulates=1000,
        kept_multiply_accumulates=1000,
        speeds=speeds,
    )
    pruned_sha256 = sha256_of(run / "keep-0.1" / "finetune" / "model.safetensors")
    pruned = dense.model_copy(update={"model_sha256": pruned_sha256, "file": "model-int8.onnx", "precision": "int8"})
    benchmark = Benchmark(
        created="2026-11-30T12:00:00+00:00",
        processor="A processor",
        cores=2,
        versions={},
        image_size=28,
        reference="dense in torch",
        entries=(dense, pruned),
    )
    (run / "benchmark.json").write_text(benchmark.model_dump_json(exclude_none=True))
    assert main(["export", "demo", "--keep", "0.1", "--format", "torch"]) == 0
    folder = run / "keep-0.1" / "finetune" / "export"
    (speed,) = Card.read(folder / "card.json").speeds
    assert (speed.name, speed.milliseconds, speed.times_as_fast) == ("model-int8.onnx, ONNX Runtime, int8", 4.0, 3.0)
    assert "A processor, beside dense in torch" in (folder / "README.md").read_text()


def check_card(folder: Path, out: str) -> None:
    """The card has the verdicts' counts, and what was printed."""
    card = Card.read(folder / "card.json")
    attack, verdicts = card.attack, read_verdicts(folder / "verdicts.parquet")
    assert attack is not None
    assert attack.images == len(verdicts["sample_id"]) == 60
    for column in ("clean_correct", "robust_correct", "network_clean_correct", "network_robust_correct"):
        assert getattr(attack, column) == verdicts[column].sum()
        assert not (verdicts["robust_correct"] & ~verdicts["clean_correct"]).any()
    assert attack.file_sha256 == sha256_of(folder / "model-int8.onnx")
    assert card.stamped == (attack.doubts == ()) == out.endswith("stamped\n")
    text = (folder / "README.md").read_text()
    assert f"| model-int8.onnx | {100 * attack.clean_accuracy.value:.1f} % (" in text
    assert "objective pgd" in text


def claim_more(folder: Path) -> None:
    """A robust accuracy that the verdicts do not have."""
    values = json.loads((folder / "card.json").read_text())
    attack = values["attack"]
    attack["robust_correct"] += 1
    attack["robust_accuracy"]["value"] = attack["robust_correct"] / attack["images"]
    attack["robust_accuracy"]["high"] = 1.0
    (folder / "card.json").write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--images", "5"], "--images 5 is for --attack"),
        (["--attack", "reduced", "--images", "some"], "--images some: expected all or a number"),
        (["--attack", "reduced", "--format", "torch"], "--attack is for ONNX files"),
    ],
)
def test_an_attack_that_cannot_be_is_refused_before_anything_is_written(
    options: list[str], message: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", "demo", "--keep", "0.1", *options]) == 2
    assert message in capsys.readouterr().err
    assert not (run / "keep-0.1" / "finetune" / "export").exists()


def test_int8_alone_keeps_an_earlier_float_file(run: Path, tmp_path: Path) -> None:
    """It is made from a float file, but not from one that is there."""
    out = tmp_path / "files"
    out.mkdir()
    (out / "model.onnx").write_text("mine")
    command = ["export", "demo", "--keep", "0.1", "--method", "magnitude", "--format", "onnx-int8", "--out", str(out)]
    assert main(command) == 0
    assert {path.name for path in out.glob("model*")} == {"model-int8.onnx", "model-int8.onnx.gz", "model.onnx"}
    assert [file.name for file in Card.read(out / "card.json").files] == ["model-int8.onnx"]
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
