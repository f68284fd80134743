"""Masks that change: from when on they have their budget, so that a checkpoint may be selected, and their structure."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import nn

from pipeline.models import build_network
from pipeline.models.pruning.drop_and_grow import first_masks
from pipeline.models.pruning.score_init import first_scores, zero
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


def changing_masks(method: str, structure: str, keep: str, steps: int) -> list[dict[str, torch.Tensor]]:
    """The masks at first and after every step that changes them; pruned weights are zeroed, the others random."""
    sparsity = {"keep_fractions": [keep], "structure": structure, "baselines": [method]}
    recipe = small_recipe(Path("."), model={"arch": "cnn_small"}, sparsity=sparsity)
    stage = stages_of(recipe)[-1]
    assert stage.keep_fraction is not None
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 10))
    init = first_scores("ones", 0)
    if method != "gradual":
        random = first_scores("random", 0)
        init = first_masks(network, stage.keep_fraction, stage.allocation, random, stage.structure)
    scores = Scores.attach(network, stage.keep_fraction, stage.mask_source, init, stage.structure)
    engine = cast(Engine, SimpleNamespace(apply_masks=lambda: None))
    dynamic = build_dynamic_masks(stage, recipe.seed, scores, engine, Progress(0, steps // 2, steps))
    seen, generator = [{name: mask.clone() for name, mask in scores.masks().items()}], torch.Generator().manual_seed(0)
    for step in range(1, steps + 1):
        for name, weight in scores.weights().items():
            weight.copy_(torch.randn(weight.shape, generator=generator) * scores.masks()[name])
        dynamic.count(step, 40)
        dynamic.update(step)
        if step % (steps // 8) == 0:
            dynamic.validated(0.1)
        seen.append({name: mask.clone() for name, mask in scores.masks().items()})
    return [
        masks for i, masks in enumerate(seen) if not i or any(not torch.equal(masks[n], seen[i - 1][n]) for n in masks)
    ]


def test_gradual_pruning_takes_every_group_from_m_of_m_to_n_of_m() -> None:
    history = changing_masks("gradual", "2:4", "0.5", 40)
    counts = []
    for before, after in pairwise(history):
        assert not any((after[name] & ~before[name]).any() for name in after), "pruned once, pruned for good"
        groups = torch.cat([after[name].movedim(1, -1).reshape(-1, 4).sum(-1) for name in ("1.weight", "2.weight")])
        counts.append(groups.unique().tolist())
    assert counts[-1] == [2]
    assert [3] in counts
    assert all(len(each) == 1 for each in counts), "all groups keep as many"
    assert int(history[-1]["0.weight"].sum()) == 216 // 2, "3 inputs have no groups of 4"


@pytest.mark.parametrize("method", ["flying_bird", "flying_bird_plus"])
def test_flying_bird_exchanges_whole_blocks(method: str) -> None:
    history = changing_masks(method, "1x4", "0.25", 64)
    whole = [
        {name: mask.flatten(1).unflatten(1, (-1, 4)) for name, mask in m.items() if name != "0.weight"} for m in history
    ]
    assert all(bool((b.all(-1) | ~b.any(-1)).all()) for blocks in whole for b in blocks.values())
    kept = [[int(mask.sum()) for mask in masks.values()] for masks in history]
    assert kept[0] == kept[-1] == [54, 4 * 36, 4 * 5], "27 inputs have no blocks of 4"
    assert len(kept) > 20
    assert (len({tuple(each) for each in kept}) > 1) == (method == "flying_bird_plus")
