"""Masks that change while weights train: exact counts, zeros where pruned, the same on 1, 2 and 4 workers."""

from __future__ import annotations

import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from pipeline.distributed import Group
from pipeline.models import build_network
from pipeline.models.pruning.allocation import mask_rule
from pipeline.models.pruning.scores import Scores
from pipeline.models.state import named_state, train_only
from pipeline.recipe.methods import FROM_SCRATCH, Allocation, MethodName
from pipeline.recipe.schedules import kept_fraction_at
from pipeline.recipe.stages import Stage, stages_of
from pipeline.run.progress import Progress
from pipeline.training.batchnorm import BatchStatistics
from pipeline.training.context import RunContext
from pipeline.training.dynamic_masks import build_dynamic_masks
from pipeline.training.engine import Engine
from pipeline.training.stage_start import score_init
from tests.support.processes import run_group
from tests.support.small_recipe import small_recipe

pytestmark = pytest.mark.timeout(900)
MICRO, COUNT = 8, 4
STEPS_PER_EPOCH, EPOCHS = 20, {"pretrain": 1, "prune": 1, "finetune": 1}
STEPS = 23
"""Beyond the end of gradual pruning."""
SHORT = Progress(0, 2, 32)
"""Of a training from scratch: masks change after every step, and the plus variant adapts after steps 17 to 24."""
RESUMED = 20
SETTINGS: dict[str, tuple[MethodName, Allocation, str]] = {
    "gradual": ("gradual", "uniform", "sgd"),
    "gradual, erk, adam": ("gradual", "erk", "adam"),
    "gradual, global": ("gradual", "global", "sgd"),
    "flying bird": ("flying_bird", "uniform", "sgd"),
    "flying bird, erk, adam": ("flying_bird", "erk", "adam"),
    "flying bird plus, global": ("flying_bird_plus", "global", "sgd"),
}


def _stage(name: str, zero: int) -> tuple[Any, Stage]:
    method, allocation, optimizer = SETTINGS[name]
    lr = 0.05 if optimizer == "sgd" else 0.002
    phase = {"lr": lr, "optimizer": optimizer, "weight_decay": 1e-2}
    recipe = small_recipe(
        Path("."),
        phases={key: phase | {"epochs": epochs} for key, epochs in EPOCHS.items()},
        batch={"batch_per_step": MICRO * COUNT, "micro_batch": MICRO},
        engine={"zero_stage": zero},
        model={"arch": "cnn_small"},
        sparsity={"keep_fractions": ["0.05"], "allocation": allocation, "baselines": [method]},
    )
    return recipe, stages_of(recipe)[-1]


def _batches(step: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(step)
    images = torch.rand(COUNT, MICRO, 3, 28, 28, generator=generator)
    labels = torch.randint(0, 10, (COUNT, MICRO), generator=generator)
    return list(zip(images, labels, strict=True))


def _train(group: Group, name: str, zero: int) -> dict[int, str]:
    """Train, checking each step; returns step -> hash of the masks, for steps that changed them."""
    recipe, stage = _stage(name, zero)
    network = build_network(recipe.model, 3, recipe.data.image_size)
    context = RunContext(recipe, Path("."), "token", group)
    assert stage.keep_fraction is not None
    scores = Scores.attach(network, stage.keep_fraction, stage.mask_source, score_init(context, stage, network))
    train_only(network.train(), "weights")
    engine = Engine(network, scores, stage.optimisation, context)
    progress = Progress(0, STEPS_PER_EPOCH, STEPS_PER_EPOCH * stage.optimisation.epochs)
    if stage.phase in FROM_SCRATCH:
        progress = SHORT
    dynamic = build_dynamic_masks(stage, recipe.seed, scores, engine, progress)
    statistics, local = BatchStatistics(network, group), COUNT // group.world
    weights, hashes = scores.weights(), {0: scores.mask_sha256()}
    budget = {key: int(mask.sum()) for key, mask in scores.masks().items()}
    for step in range(1, SHORT.total_steps if stage.phase in FROM_SCRATCH else STEPS + 1):
        for images, labels in _batches(step)[group.rank * local : (group.rank + 1) * local]:
            engine.backward(F.cross_entropy(engine.forward(images).float(), labels))
            engine.advance()
        statistics.fold_in(torch.zeros(1, dtype=torch.float64))
        before = {key: mask.clone() for key, mask in scores.masks().items()}
        trained = {key: weight.clone() for key, weight in weights.items()}
        dynamic.count(robust_correct=step, images=40)
        dynamic.update(step)
        if step % progress.steps_per_epoch == 0:
            dynamic.validated(0.1)
        if step == RESUMED:
            state = dynamic.state()
            dynamic = build_dynamic_masks(stage, recipe.seed, scores, engine, progress)
            dynamic.load(state)
        after, optimizer_state = scores.masks(), engine.state()
        for key, weight in weights.items():
            assert not trained[key][~before[key]].any(), (step, key, "a pruned weight has moved")
            assert torch.equal(weight, trained[key] * (before[key] & after[key])), (step, key, "a kept one has changed")
            for slot in ("momentum_buffer", "exp_avg", "exp_avg_sq"):
                if (state := optimizer_state.get(f"optim/weight/{key}/{slot}")) is not None:
                    fresh = ~(before[key] & after[key])
                    assert not state[fresh].any(), (step, key, slot)
                    assert state.any()
        if any(not torch.equal(before[key], after[key]) for key in before):
            if stage.phase == "gradual":
                _check_gradual(stage, step, trained, before, after)
            else:
                _check_exchange(stage, step, trained, before, after, budget)
            hashes[step] = scores.mask_sha256()
    state = named_state(network)
    assert all(torch.equal(state[f"score/{key}"] != 0, mask) for key, mask in scores.masks().items()), "a checkpoint's"
    statistics.close()
    engine.close()
    return hashes


Tensors = dict[str, torch.Tensor]


def _check_gradual(stage: Stage, step: int, weights: Tensors, before: Tensors, after: Tensors) -> None:
    assert stage.keep_fraction is not None
    elapsed = Fraction(step, STEPS_PER_EPOCH * EPOCHS["prune"])
    keep = kept_fraction_at(stage.keep_fraction, elapsed)
    sizes = {key: weight.numel() for key, weight in weights.items()}
    counts = {key: int(mask.sum()) for key, mask in after.items()}
    if stage.allocation == "uniform":
        assert counts == {key: size - int((1 - keep) * size) for key, size in sizes.items()}
    else:
        assert sum(counts.values()) == sum(sizes.values()) - int((1 - keep) * sum(sizes.values()))
    strongest = {key: weight.abs().max() for key, weight in weights.items()}
    for key, weight in weights.items():
        if stage.allocation == "uniform":
            assert not (after[key] & ~before[key]).any(), "pruned once, pruned for good"
        assert int((after[key] & ~before[key]).sum()) <= 1, "by rounding"
        kept, pruned = weight[after[key]].abs(), weight[before[key] & ~after[key]].abs()
        assert after[key].any()
        if len(pruned) and not (after[key] & ~before[key]).any():
            assert kept.min() >= pruned.max(), "the smallest are pruned"
    if stage.allocation == "global":
        kept = torch.cat([w[after[key] & (w.abs() < strongest[key])].abs() for key, w in weights.items()])
        pruned = torch.cat([w[before[key] & ~after[key]].abs() for key, w in weights.items()])
        assert kept.min() >= pruned.max()
    if elapsed == 1:
        shapes = {key: weight.shape for key, weight in weights.items()}
        final = mask_rule(shapes, stage.keep_fraction, stage.allocation)(weights, {})
        assert counts == {key: int(mask.sum()) for key, mask in final.items()}, "as a mask of the other methods"


def _check_exchange(
    stage: Stage, step: int, weights: Tensors, before: Tensors, after: Tensors, budget: dict[str, int]
) -> None:
    """In the plus variant the gap widens in every epoch, and held-out accuracy never rises."""
    elapsed = step / SHORT.total_steps
    fraction = 0.005 + (0.5 - 0.005) / 2 * (1 + math.cos(math.pi * elapsed))
    for key, weight in weights.items():
        kept, size = int(before[key].sum()), weight.numel()
        fewer = more = 0
        if stage.phase == "flying_bird_plus" and 17 <= step <= 24:
            fewer, more = math.ceil(0.4 * fraction * kept), math.ceil(0.05 * kept)
        if stage.phase == "flying_bird_plus" and step == 25:
            assert kept != budget[key]
            fewer, more = max(kept - budget[key], 0), max(budget[key] - kept, 0)
        dropped, grown = before[key] & ~after[key], after[key] & ~before[key]
        exchanged = math.ceil(fraction * kept)
        if exchanged + more <= size - kept and exchanged + fewer <= kept:
            assert (int(dropped.sum()), int(grown.sum())) == (exchanged + fewer, exchanged + more)
        assert int(after[key].sum()) == kept - fewer + more
        if stage.phase == "flying_bird" or step <= 16 or step >= 25:
            assert int(after[key].sum()) == budget[key]
        survivors = weight[before[key] & after[key]].abs()
        if dropped.any() and len(survivors):
            assert survivors.min() >= weight[dropped].abs().max(), "the smallest are dropped"


def _train_all(group: Group, zero: int) -> dict[str, dict[int, str]]:
    return {name: _train(group, name, zero) for name in SETTINGS}


@pytest.fixture(scope="module")
def hashes() -> dict[int, list[dict[str, dict[int, str]]]]:
    """World size -> per worker and setting, the hashes of masks by step; at ZeRO 0, 1 and 2."""
    return {world: run_group(world, _train_all, zero) for world, zero in ((1, 0), (2, 1), (4, 2))}


@pytest.mark.parametrize("name", SETTINGS)
def test_masks_are_the_same_on_1_2_and_4_workers(hashes: dict[int, list[Any]], name: str) -> None:
    (reference,) = hashes[1]
    for world in (2, 4):
        assert [worker[name] for worker in hashes[world]] == world * [reference[name]]


@pytest.mark.parametrize("name", ["flying bird", "flying bird, erk, adam", "flying bird plus, global"])
def test_flying_bird_exchanges_until_before_the_last_step(hashes: dict[int, list[Any]], name: str) -> None:
    masks = hashes[1][0][name]
    assert list(masks) == list(range(SHORT.total_steps))
    assert len(set(masks.values())) == len(masks)


def test_gradual_pruning_changes_masks_every_tenth_of_an_epoch_and_then_rests(hashes: dict[int, list[Any]]) -> None:
    assert list(hashes[1][0]["gradual"]) == [0, *range(2, 21, 2)]
