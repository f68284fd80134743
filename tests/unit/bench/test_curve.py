"""The model of a curve's cost, against passes that are counted one by one, and the page against the model."""

from __future__ import annotations

import shlex

import pytest

from pipeline.recipe.file import load_recipe
from pipeline.recipe.stages import stages_of
from tests.bench.curve import FORWARD, FP32, attack_passes, costs, main, mean_area, pgd_passes
from tests.bench.scaling import ATTACK_PASS
from tests.support.commands import ROOT

FAITHFUL, FAST, FREE = (ROOT / "recipes" / f"imagenet_resnet50_{name}.yaml" for name in ("linf4", "fast", "free"))
SMALL = ["data.train_images=1000", "data.validation_images=100", "evaluation.images=50"]


def test_training_is_counted_epoch_by_epoch() -> None:
    pretrain, prune, finetune, magnitude, *_ = costs(load_recipe(FAITHFUL, SMALL))
    each = 1000 * (1 + ATTACK_PASS + ATTACK_PASS)  # two attack steps
    found = [(cost.epochs, cost.passes) for cost in (pretrain, prune, finetune, magnitude)]
    assert found == [(n, pytest.approx(n * each)) for n in (40, 3 * 5, 3 * 25, 3 * 30)]
    replayed, *_ = costs(load_recipe(FREE, SMALL))
    assert replayed.passes == pytest.approx(23 * 4 * 1000)


def test_growing_images_count_by_their_area() -> None:
    recipe = load_recipe(FAST, ["phases.prune.resolution={smallest: 128, grows_from: 1, full_from: 4}", *SMALL])
    prune = stages_of(recipe)[1]
    expected = [128, 128, 160, 192, 224]
    assert mean_area(prune, 224) == pytest.approx(sum(size * size for size in expected) / 5 / 224**2)
    flat = load_recipe(FAST, [f"phases.{name}.resolution=null" for name in ("pretrain", "prune", "finetune")])
    assert {mean_area(stage, 224) for stage in stages_of(flat)} == {1.0}


def test_evaluations_are_counted_pass_by_pass() -> None:
    parts = {cost.part: cost.passes for cost in costs(load_recipe(FAITHFUL, SMALL))}
    clean, step = FORWARD, ATTACK_PASS
    one = sum([clean, *[step] * 20, FORWARD] + [*[step] * 20, FORWARD] * 2)
    assert pgd_passes(20, 3) == pytest.approx(one)
    assert attack_passes(111, 101) == pytest.approx(101 * step + 10 * FORWARD)
    assert parts["PGD, 7 networks"] == pytest.approx(FP32 * 7 * 50 * one)
    assert parts["held-out images"] == pytest.approx(FP32 * 220 * 100 * pgd_passes(5, 1))


def test_an_objective_that_is_not_evaluated_by_pgd_is_refused() -> None:
    with pytest.raises(ValueError, match=r"objective.name=crown_ibp is not evaluated by PGD"):
        costs(load_recipe(ROOT / "recipes" / "fashion_mnist_crown_ibp.yaml"))


def test_the_page_holds_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    page = (ROOT / "docs" / "scaling.md").read_text().replace("\\\n", " ")
    commands = [line for line in page.splitlines() if line.startswith("python -m tests.bench.curve recipes/")]
    assert len(commands) == 6
    for command in commands:
        words = shlex.split(command)[3:]
        assert main([str(ROOT / words[0]), *words[1:]]) == 0
        assert capsys.readouterr().out.strip() in page, command

    words = next(span for span in page.split("`") if "phases.pretrain.epochs=90" in span).split()[3:]
    assert main([str(ROOT / words[0]), *words[1:]]) == 0
    pretrain = capsys.readouterr().out.splitlines()[2]
    assert (
        next(line for line in page.splitlines() if line.startswith("| PGD-3, 90 epochs")).split("|")[-2]
        == (pretrain.split("|")[-2])
    )
