"""`run --dry-run`: the plan, then the resolved recipe, then what would stop the run."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from launch.__main__ import main
from launch.commands.dry_run import plan_lines
from pipeline.models import build_network
from pipeline.recipe.file import dump_recipe, load_recipe
from pipeline.recipe.schema import Recipe
from pipeline.recipe.sparsity import Tune
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


def test_the_memory_of_perturbations_is_part_of_the_plan(recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    """1,280 images of 3 x 28 x 28 bytes, in the pretrain phase alone, which keeps two checkpoints."""

    def disk_mb(out: str) -> float:
        (line,) = [line for line in out.splitlines() if line.startswith("# disk: about ")]
        return float(line.split()[3])

    _, plain, _ = dry_run(recipe, capsys)
    remembers = "phases.pretrain.objective={name: fgsm_pgi, step_size: 1/10, overfitting_guard: null}"
    code, out, _ = dry_run(recipe, capsys, remembers)
    assert code == 0
    assert "# memory: 3.0 MB per worker, for perturbations; they are in checkpoints too\n" in out
    assert disk_mb(out) - disk_mb(plain) == pytest.approx(2 * 1280 * (3 * 28**2 + 4) / 1e6, abs=0.1)
    assert "memory: " not in plain


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


def measured_run(recipe: Recipe, evaluation_s: float = 0.0) -> None:
    """runs/earlier, at 0.01 s per image."""
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
            since = folder.result.stat().st_mtime + evaluation_s
            os.utime(folder.evaluation(label), (since, since))
    (run / "recipe.yaml").write_text(dump_recipe(recipe), encoding="utf-8")


def test_time_is_estimated_from_a_run_of_the_same_stages(recipe: Recipe) -> None:
    """No time for evaluations; another seed and number of epochs take the same per image."""
    measured_run(recipe)
    images = sum(20 * 64 * stage.optimisation.epochs for stage in stages_of(recipe))
    other = recipe.model_copy(update={"seed": 7, "name": "other"})
    lines, problems = plan_lines(other, None, with_torch=False)
    assert problems == []
    minutes, seconds = divmod(round(images * 0.01), 60)
    assert lines[-1] == f"time: about 0:{minutes:02}:{seconds:02}, as measured in runs/earlier"
    slower = other.model_copy(update={"evaluation": other.evaluation.model_copy(update={"restarts": 9})})
    assert plan_lines(slower, None, with_torch=False)[0][-1].startswith("time: unknown")


def with_trials(recipe: Recipe, trials: int) -> Recipe:
    tune = Tune(finetune_lr=tuple(0.01 * (number + 1) for number in range(trials)))
    return recipe.model_copy(update={"sparsity": recipe.sparsity.model_copy(update={"tune": tune}), "name": "tuned"})


@pytest.mark.parametrize("tuned_before", [False, True])
def test_trials_are_in_the_plan_and_in_its_time(recipe: Recipe, tuned_before: bool) -> None:
    """Each takes the time of its training; the evaluation, of 100 s, is that of the chosen network."""
    measured_run(with_trials(recipe, 2) if tuned_before else recipe, evaluation_s=100)
    lines, problems = plan_lines(with_trials(recipe, 3), None, with_torch=False)
    assert problems == []
    assert lines[0] == "runs/tuned (new)"
    stages = {line.split()[0]: line for line in lines if line.startswith("  ")}
    assert len(stages) == 1 + (1 + 3 + 1) + (3 + 1)
    chosen = "the best of its 3 trials, by robust accuracy on 200 held-out images"
    assert [name for name, line in stages.items() if chosen in line] == ["keep-0.1/finetune", "keep-0.1/magnitude"]
    trial = stages["keep-0.1/trial-3/magnitude"]
    assert "lr 0.03 " in trial
    assert trial.endswith("trains weights, from pretrain; 80 steps, 5,120 images, 3 passes each")
    assert "evaluated: 3 networks, by pgd (all test images)" in lines
    images = 20 * 64 * (2 + 2 + 3 * 2 + 3 * 4)
    minutes, seconds = divmod(round(images * 0.01) + 3 * 100, 60)
    assert lines[-1] == f"time: about 0:{minutes:02}:{seconds:02}, as measured in runs/earlier"


def test_a_dense_network_that_is_there_takes_the_time_of_its_evaluation(
    recipe: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(build_network(recipe.model, 0, 28).backbone.state_dict(), "fits.pt")
    imported = ["phases.pretrain=null", "model.weights=fits.pt"]
    code, out, _ = dry_run(recipe, capsys, *imported)
    assert code == 0
    assert "pretrain            the weights of fits.pt, as they are\n" in out
    assert "evaluated: 3 networks" in out
    code, _, err = dry_run(recipe, capsys, "phases.pretrain=null")
    assert code == 2
    assert "phases.pretrain is null, so that no dense network is trained, and model.weights is null" in err

    Path("recipe.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
    recipe = load_recipe("recipe.yaml", [*imported, f"model.weights={Path('fits.pt').absolute()}"])
    measured_run(recipe, evaluation_s=100)
    (Path("runs/earlier/pretrain") / "metrics.jsonl").write_text("")
    lines, problems = plan_lines(recipe.model_copy(update={"name": "other"}), None, with_torch=False)
    assert problems == []
    minutes, seconds = divmod(round(20 * 64 * (2 + 2 + 4) * 0.01) + 3 * 100, 60)
    assert lines[-1] == f"time: about 0:{minutes:02}:{seconds:02}, as measured in runs/earlier"


def test_weights_of_other_classes_need_a_new_last_layer(recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    other = recipe.model.model_copy(update={"num_classes": 7})
    torch.save(build_network(other, 0, 28).backbone.state_dict(), "seven.pt")
    code, _, err = dry_run(recipe, capsys, "model.weights=seven.pt")
    assert code == 2
    assert "set model.weights_head=new, which trains a new last layer" in err
    code, out, _ = dry_run(recipe, capsys, "model.weights=seven.pt", "model.weights_head=new")
    assert code == 0
    assert "trains weights, from seven.pt with a new last layer; 40 steps" in out
