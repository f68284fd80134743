"""A tree of ImageNet's shape is written, and the shipped recipe takes a few steps of every phase on it: ResNet-50, two
workers, from the command line to the report."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import torchvision
from safetensors.torch import load_file

from pipeline.run.files import read_json, sha256_of
from tests.support.commands import ROOT, Finished, launch
from tests.support.synthetic_data import make_imagenet_tree

CLASSES = 1000
BROKEN = ("truncated", "empty", "text", "zeroed")
RECIPE = ROOT / "recipes" / "imagenet_resnet50_linf4.yaml"
OVERRIDES = (
    "data.image_size=32",
    "data.validation_images=16",
    "data.train_images=32",
    "batch.batch_per_step=16",
    "batch.micro_batch=8",
    "workers.count=2",
    "workers.threads=1",
    "workers.device=cpu",
    "engine.precision=fp32",  # bf16 takes minutes on a processor that has no instructions for it
    "objective.steps=1",
    "phases.pretrain.epochs=1",
    "phases.pretrain.warmup_epochs=0",
    "phases.pretrain.lr=0.01",
    "phases.prune.epochs=1",
    "phases.finetune.epochs=1",
    "sparsity.keep_fractions=[0.1]",
    "evaluation.steps=1",
    "evaluation.restarts=1",
    "evaluation.chunk=250",
    "evaluation.validation_steps=1",
    "evaluation.honesty_images=2",
    "evaluation.attacks=[{name: apgd, images: 4, chunk: 2}]",  # which has little to do, as hardly an image is right
    "tracking.log_every_steps=1",
    "tracking.wandb=disabled",
)
STEPS = {"pretrain": 2, "keep-0.1/prune": 2, "keep-0.1/finetune": 2, "keep-0.1/magnitude": 4}
PRUNED = [stage for stage in STEPS if stage != "pretrain"]
EVALUATED = [stage for stage in STEPS if stage != "keep-0.1/prune"]


@dataclass(frozen=True)
class Story:
    """What was done once, for all tests here."""

    place: Path
    offenders: list[Path]
    refused: Finished
    refused_left: list[Path]
    written: Finished
    ran: Finished

    @property
    def run(self) -> Path:
        return self.place / "runs" / "shape"

    def weights(self, stage: str) -> dict[str, torch.Tensor]:
        return load_file(self.run / stage / "model.safetensors")


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Story]:
    place = tmp_path_factory.mktemp("imagenet_shape")
    offenders = make_imagenet_tree(place / "tree", CLASSES, per_class=1, seed=0, val_per_class=1, broken=BROKEN)
    write = ("data", "write", "image_folder", "--source", "tree", "--out", "data/imagenet")
    refused = launch(place, *write, deadline_s=120)
    left = [path for path in (place / "data").rglob("*") if path.is_file()]
    written = launch(place, *write, "--skip-broken", deadline_s=120)
    ran = launch(place, "run", str(RECIPE), "--name", "shape", *OVERRIDES, deadline_s=900)
    yield Story(place, offenders, refused, left, written, ran)
    if not request.session.testsfailed:
        shutil.rmtree(place)  # 1.8 GB of checkpoints, of which pytest would keep three


pytestmark = pytest.mark.timeout(1200)


def test_broken_images_are_refused_all_at_once(story: Story) -> None:
    assert story.refused.code == 2
    assert len(story.offenders) == len(BROKEN)
    for path in story.offenders:
        assert str(path.relative_to(story.place)) in story.refused.err
    assert "--skip-broken" in story.refused.err
    assert story.refused_left == []


def test_the_rest_is_written_and_reported(story: Story) -> None:
    assert story.written.code == 0, story.written.err
    for split in ("train", "test"):
        manifest = read_json(story.place / "data" / "imagenet" / f"{split}.beton.manifest.json")
        assert manifest["num_samples"] == manifest["num_classes"] == CLASSES
        assert manifest["label_histogram"] == [1] * CLASSES
        assert manifest["converted"] == {"cmyk": CLASSES // 10, "grey": CLASSES // 10}
        skipped = {entry["path"] for entry in manifest["skipped"]}
        assert skipped == ({f"{p.parent.name}/{p.name}" for p in story.offenders} if split == "train" else set())


def test_the_run_ends_well(story: Story) -> None:
    assert story.ran.code == 0, story.ran.err


@pytest.mark.parametrize("stage", STEPS)
def test_a_stage_leaves_its_result_and_metrics(story: Story, stage: str) -> None:
    folder = story.run / stage
    result = read_json(folder / "result.json")
    assert (result["stage"], result["steps"], result["selected_step"]) == (stage, STEPS[stage], STEPS[stage])
    assert result["model_sha256"] == sha256_of(folder / "model.safetensors")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["kind"] == "train"] == list(range(1, STEPS[stage] + 1))
    assert [row["step"] for row in rows if row["kind"] == "validation"] == list(range(2, STEPS[stage] + 1, 2))
    assert all(row["images"] == 16 and np.isfinite(row["loss"]) for row in rows if row["kind"] == "train")


@pytest.mark.parametrize("stage", STEPS)
def test_torchvision_loads_the_network(story: Story, stage: str) -> None:
    plain = torchvision.models.resnet50(num_classes=CLASSES)
    plain.load_state_dict(story.weights(stage), strict=True)
    with torch.no_grad():
        assert bool(torch.isfinite(plain.eval()(torch.zeros(1, 3, 32, 32))).all())


@pytest.mark.parametrize("stage", PRUNED)
def test_the_budget_is_exact_in_every_layer(story: Story, stage: str) -> None:
    layers = read_json(story.run / stage / "result.json")["layers"]
    weights = story.weights(stage)
    assert len(layers) == 54
    assert sum(layer["total"] for layer in layers) == 25_502_912  # every convolution and the last layer of ResNet-50
    for layer in layers:
        total = weights[layer["name"]].numel()
        assert (layer["total"], layer["kept"]) == (total, total - 9 * total // 10)
        assert int(weights[layer["name"]].count_nonzero()) <= layer["kept"]
    nonzero = sum(int(weights[layer["name"]].count_nonzero()) for layer in layers)
    assert nonzero > 0.99 * sum(layer["kept"] for layer in layers)  # a kept weight may be zero by chance


def test_each_phase_moves_what_it_should(story: Story) -> None:
    dense, prune, finetune = (story.weights(stage) for stage in ("pretrain", "keep-0.1/prune", "keep-0.1/finetune"))
    names = [layer["name"] for layer in read_json(story.run / "keep-0.1/prune" / "result.json")["layers"]]
    for name in names:
        kept = prune[name] != 0
        assert torch.equal(prune[name][kept], dense[name][kept]), f"prune changed the weights of {name}"
        assert not bool(finetune[name][~kept].any()), f"finetune left the mask of {name}"
    assert any(not torch.equal(finetune[name], prune[name]) for name in names)
    masks = {stage: read_json(story.run / stage / "result.json")["mask_sha256"] for stage in STEPS}
    assert masks["pretrain"] is None
    assert masks["keep-0.1/prune"] == masks["keep-0.1/finetune"] != masks["keep-0.1/magnitude"]


@pytest.mark.parametrize("stage", EVALUATED)
def test_the_evaluation_counts_every_image_once(story: Story, stage: str) -> None:
    folder = story.run / stage / "evaluate"
    table, facts = pq.read_table(folder / "pgd.parquet"), read_json(folder / "pgd.json")
    columns: dict[str, Any] = {name: table[name].to_numpy() for name in table.column_names}
    assert np.array_equal(columns["sample_id"], np.arange(CLASSES))
    assert np.array_equal(np.sort(columns["label"]), np.arange(CLASSES))
    counts = {
        name: int(columns[name.replace("_top5_correct", "_top5")].sum())
        for name in ("clean_correct", "clean_top5_correct", "robust_correct", "robust_top5_correct")
    }
    assert {name: facts[name] for name in counts} == counts
    settings = facts["settings"]
    assert (facts["images"], settings["eps"], settings["steps"], settings["restarts"]) == (CLASSES, "4/255", 1, 1)
    assert not (columns["robust_correct"] & ~columns["clean_correct"]).any()
    assert not (story.run / "keep-0.1/prune" / "evaluate").exists()


def test_the_report_is_drawn(story: Story) -> None:
    reported = launch(story.place, "report", "shape", deadline_s=120)
    assert reported.code == 0, reported.err
    table = reported.out.splitlines()
    assert [line.split()[:3] for line in table[1:4]] == [
        ["dense", "0", "%"],
        ["HYDRA", "90", "%"],
        ["magnitude", "90", "%"],
    ]
    assert "missing" not in reported.out
    drawn = {path.name for path in (story.run / "report").iterdir() if path.stat().st_size}
    pictures = {f"{name}.{kind}" for name in ("robust_accuracy", "kept_fraction") for kind in ("png", "csv")}
    tables = {"further_attacks.csv", "per_class_accuracy.csv", "confusion.csv"}
    assert drawn == {"report.html", *tables, *pictures}
    assert table[-1] == "page: runs/shape/report/report.html"
    # Three for every example, of which there are as many as its time allows; images this small are exact.
    assert (story.run / "report" / "report.html").read_text().count('<img src="data:image/png') in range(3, 25, 3)
