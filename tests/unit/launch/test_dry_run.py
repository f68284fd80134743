"""`run --dry-run`: the plan, then the resolved recipe, then what would stop the run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from launch.__main__ import main
from launch.commands.dry_run import plan_lines
from pipeline.models import build_network
from pipeline.recipe.file import dump_recipe, load_recipe
from pipeline.recipe.schema import Recipe
from pipeline.recipe.stages import stages_of
from pipeline.run.layout import StageFolder
from tests.support.small_recipe import small_recipe


@pytest.fixture
def recipe(fashion_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    """On data files that exist; 1,280 training images make 20 steps of 64."""
    monkeypatch.chdir(tmp_path)
    return small_recipe(fashion_data)


def dry_run(recipe: Recipe, capsys: pytest.CaptureFixture[str], *overrides: str) -> tuple[int, str, str]:
    Path("recipe.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
    code = main(["run", "recipe.yaml", *overrides, "--name", "x", "--dry-run"])
    printed = capsys.readouterr()
    assert not Path("runs").exists()
    return code, printed.out, printed.err


def test_the_plan_comes_first_and_the_whole_is_a_recipe(recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = dry_run(recipe, capsys)
    assert (code, err) == (0, "")
    plan, _, _ = out.partition("name: small")
    lines = [line.removeprefix("# ") for line in plan.splitlines()]
    assert lines[0] == "runs/x (new)"
    assert lines[1] == "1,280 training images, 200 held out, 10 classes; 20 steps of 64 images per epoch"
    assert "pretrain" in lines[3]
    assert lines[3].endswith("trains weights, from scratch; 40 steps, 2,560 images, 3 passes each")
    assert "keep-0.1/magnitude" in plan
    assert "evaluated: 3 networks, by pgd (all test images)" in lines
    assert any(line.startswith("disk: about ") for line in lines)
    assert lines[-1].startswith("time: unknown, as no run in runs/ has measured pretrain")
    Path("printed.yaml").write_text(out, encoding="utf-8")
    assert load_recipe("printed.yaml") == recipe


def test_the_plan_counts_the_passes_of_s2ap(recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = dry_run(recipe, capsys, "sparsity.baselines=[s2ap]")
    costs = {line.split()[1]: line.split(", ")[-1] for line in out.splitlines() if line.endswith("passes each")}
    assert costs["keep-0.1/prune"] == costs["keep-0.1/s2ap/finetune"] == "3 passes each"
    assert costs["keep-0.1/s2ap/prune"] == "4 passes each"


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["data.train_file=absent.beton"], "data.train_file = absent.beton does not exist"),
        (["data.validation_images=2000000"], "data.validation_images 2000000"),
        (["data.train_images=2000000"], "data.train_images 2000000"),
        (["model.weights=absent.pt"], "model.weights = absent.pt does not exist"),
        (["model.weights=damaged.pt"], "damaged.pt is damaged or not a weights file"),
        (["model.weights=other.pt"], "other.pt does not fit model.arch small_cnn"),
        (["model.arch=vgg16_bn_cifar", "data.image_size=8"], "cannot take images of data.image_size 8"),
        (["data.image_size=1024", "name=.x"], "name = '.x'"),
    ],
)
def test_what_would_stop_the_run_is_said(
    recipe: Recipe, overrides: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("damaged.pt").write_bytes(b"no weights")
    torch.save({"weight": torch.zeros(3)}, "other.pt")
    code, _, err = dry_run(recipe, capsys, *overrides)
    assert code == 2
    assert words in err
    assert "Traceback" not in err


def test_weights_that_fit_are_the_start(recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(build_network(recipe.model, 0, 28).backbone.state_dict(), "fits.pt")
    code, out, _ = dry_run(recipe, capsys, "model.weights=fits.pt")
    assert code == 0
    assert "trains weights, from fits.pt; 40 steps" in out
    assert "from scratch" not in out


def test_a_name_that_is_taken_is_said(recipe: Recipe) -> None:
    folder = Path("runs/small")
    (folder / "pretrain" / "step-00000001").mkdir(parents=True)
    (folder / "recipe.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
    lines, problems = plan_lines(recipe.model_copy(update={"seed": 7}), None, with_torch=False)
    assert lines[0] == "runs/small (exists: 0 of 4 stages are finished)"
    assert "was started with another recipe (" in problems[0]
    assert "seed: 0 -> 7" in problems[0]


def test_time_is_estimated_from_a_run_of_the_same_stages(recipe: Recipe) -> None:
    """At 0.01 s per image, and no time for evaluations; another seed and number of epochs take the same per image."""
    run = Path("runs/earlier")
    for stage in stages_of(recipe):
        folder = StageFolder(run / stage.name)
        folder.evaluations.mkdir(parents=True)
        rows = [{"kind": "train", "step": 1, "images": 64, "timing": {"seconds": 0.5}}]
        rows.append({"kind": "validation", "step": 1, "images": 200, "timing": {"seconds": 0.14}})
        folder.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
        folder.result.write_text("{}")
        for label in stage.evaluations:
            shutil.copy2(folder.result, folder.evaluation(label))
    (run / "recipe.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
    images = sum(20 * 64 * stage.optimisation.epochs for stage in stages_of(recipe))
    other = recipe.model_copy(update={"seed": 7, "name": "other"})
    lines, problems = plan_lines(other, None, with_torch=False)
    assert problems == []
    minutes, seconds = divmod(round(images * 0.01), 60)
    assert lines[-1] == f"time: about 0:{minutes:02}:{seconds:02}, as measured in runs/earlier"
    slower = other.model_copy(update={"evaluation": other.evaluation.model_copy(update={"restarts": 9})})
    assert plan_lines(slower, None, with_torch=False)[0][-1].startswith("time: unknown")
