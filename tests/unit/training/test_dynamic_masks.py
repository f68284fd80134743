"""When masks that change have their budget, from which on a checkpoint may be selected."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from pipeline.models import build_network
from pipeline.models.pruning.score_init import zero
from pipeline.models.pruning.scores import Scores
from pipeline.recipe.stages import stages_of
from pipeline.run.progress import Progress
from pipeline.training.dynamic_masks import FlyingBirdPlus, build_dynamic_masks
from pipeline.training.engine import Engine
from pipeline.training.loop import Training, _validate
from tests.support.small_recipe import small_recipe


def selected(method: str, steps: int, per_epoch: int) -> tuple[int, list[int | None]]:
    """Step from which on masks have their budget; the best step so far after each epoch, for a falling accuracy."""
    recipe = small_recipe(
        Path("."),
        sparsity={"baselines": [method]},
        select="best_validation_robust",
    )
    stage = stages_of(recipe)[-1]
    network = build_network(recipe.model, 0, recipe.data.image_size)
    assert stage.keep_fraction is not None
    scores = Scores.attach(network, stage.keep_fraction, stage.mask_source, zero)
    progress = Progress(0, per_epoch, steps)
    engine = cast(Engine, SimpleNamespace(apply_masks=lambda: None))
    dynamic = build_dynamic_masks(stage, recipe.seed, scores, engine, progress)
    training: Any = SimpleNamespace(
        stage=stage,
        context=SimpleNamespace(recipe=recipe),
        state=SimpleNamespace(dynamic_masks=dynamic, network=SimpleNamespace(scores=scores)),
        validate=lambda strength: {"robust_accuracy": 1 - progress.step / steps},
        rows=None,
    )
    best = []
    for step in range(per_epoch, steps + 1, per_epoch):
        dynamic.count(1, 2)
        progress = _validate(cast(Training, training), replace(progress, step=step))
        best.append(progress.best_step)
    return dynamic.settled_step, best


@pytest.mark.parametrize(
    ("method", "settled", "best"),
    [
        ("gradual", 20, [None, 20, 20, 20]),  # prune has half of the epochs
        ("flying_bird", 0, [10, 10, 10, 10]),
        ("flying_bird_plus", 31, [None, None, None, 40]),
    ],
)
def test_a_checkpoint_is_selected_among_those_that_have_the_budget(
    method: str, settled: int, best: list[int | None]
) -> None:
    assert selected(method, 40, 10) == (settled, best)


def test_flying_bird_plus_compares_the_last_four_epochs() -> None:
    bird = FlyingBirdPlus.__new__(FlyingBirdPlus)
    bird._epoch, bird._history = [0, 0], []
    for epoch in range(7):
        for _ in range(2):
            bird.count(robust_correct=epoch, images=10)
        bird.validated(robust_accuracy=0.25)
    assert bird._history == [(epoch / 10 - 0.25, 0.25) for epoch in range(2, 7)]
