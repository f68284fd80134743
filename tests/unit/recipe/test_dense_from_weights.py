"""Recipes without a pretrain phase: the dense network is that of `model.weights`."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.recipe.file import dump_recipe, load_recipe, recipe_hash
from pipeline.recipe.schema import Recipe, RecipeError
from pipeline.recipe.stages import stages_of
from tests.support.commands import ROOT

DEMO = ROOT / "recipes" / "fashion_mnist_methods.yaml"
IMPORTED = ("phases.pretrain=null", "model.weights=w.pt", "sparsity.baselines=[magnitude, snip, gradual, s2ap]")


def load(*overrides: str) -> Recipe:
    return load_recipe(DEMO, list(overrides))


def test_the_dense_stage_trains_nothing_and_the_others_are_as_they_were() -> None:
    trained, imported = (stages_of(load(*overrides)) for overrides in (IMPORTED[1:], IMPORTED))
    assert [stage.name for stage in imported] == [stage.name for stage in trained]
    dense, earlier = imported[0], trained[0]
    assert (dense.epochs, dense.starts_from, dense.trials, dense.trained_by) == (0, None, (), None)
    for fact in ("name", "phase", "label", "title", "measure", "attacks", "objective", "evaluations"):
        assert getattr(dense, fact) == getattr(earlier, fact), fact
    plan = {"stage": "pretrain", "phase": "pretrain", "keep_fraction": None, "total_steps": 0, "steps_per_epoch": 9}
    assert dense.describe(9) == plan
    for stage, other in zip(imported[1:], trained[1:], strict=True):
        assert stage.first_epoch == other.first_epoch - earlier.epochs, "data order counts from the first training"
        assert (stage.optimisation, stage.starts_from) == (other.optimisation, other.starts_from)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["phases.pretrain=null", "sparsity.baselines=[]"], "phases.pretrain is null, so that no dense network is"),
        ([*IMPORTED, "model.weights_head=new"], "model.weights_head new: a new last layer must be trained"),
        ([*IMPORTED[:2], "sparsity.baselines=[flying_bird]"], "sparsity.baselines ['flying_bird'] train from scratch"),
        (["model.weights_head=new"], "weights_head is set without weights; name the file or remove it"),
        (["model.weights_keep_fraction=0.1"], "weights_keep_fraction is set without weights; name the file"),
        (["model.weights=w.pt", "model.weights_head=other"], "model.weights_head = 'other'"),
    ],
)
def test_what_contradicts_itself_is_one_error(overrides: list[str], words: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load(*overrides)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_resolved_recipe_without_pretraining_is_read_again(tmp_path: Path) -> None:
    recipe = load(*IMPORTED)
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe))
    again = load_recipe(tmp_path / "recipe.yaml")
    assert again == recipe
    assert recipe_hash(again) == recipe_hash(recipe) != recipe_hash(load(*IMPORTED[1:]))


def test_the_head_is_in_the_hash_unless_it_is_the_files() -> None:
    """The hash was computed before the key was there, when the recipe had no warm-up in prune."""
    as_it_was = ("model.weights=w.pt", "phases.prune.warmup_epochs=0")
    assert recipe_hash(load(*as_it_was)) == recipe_hash(load(*as_it_was, "model.weights_head=file")) == EARLIER
    assert recipe_hash(load(*as_it_was, "model.weights_head=new")) != EARLIER


EARLIER = "f7f1f3d3ff2b4bb0f8cbec213c364c8a393bfdb9abd4e085501338809b74c7db"
