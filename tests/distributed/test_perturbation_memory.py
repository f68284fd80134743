"""Remembered perturbations on 1, 2 and 4 workers, and resumed on another number of them at any step."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline import rng
from pipeline.data.loading import sampling
from pipeline.distributed import Group
from pipeline.training.perturbation_memory import EPOCHS, EXCHANGED, VALUES, PerturbationMemory
from tests.support.processes import run_group

SIZE, EPOCHS_TOTAL, RESET = 3, 4, 3
IDS = np.arange(100, 100 + 6000, 2)
"""More than one exchange sends, on one worker; some are left out in every epoch."""
MICRO, COUNT = 64, 4
PER_EPOCH = len(IDS) // (MICRO * COUNT)
CUTS = (PER_EPOCH - 3, PER_EPOCH, 2 * PER_EPOCH + 1)
WORLDS = (1, 2, 4)

Fed = dict[tuple[int, int], Tensor]
"""(step, global micro-batch) -> perturbations at its start."""
State = dict[str, Tensor]


def crops(ids: np.ndarray, epoch: int) -> np.ndarray:
    return sampling.pad_crops(ids, SIZE, 0, epoch, True)


def _steps(group: Group, first: int, last: int, start: State | None) -> tuple[Fed, dict[int, State]]:
    """The steps first..last-1, each of which changes all perturbations; the states at the cuts and at the end."""
    memory = PerturbationMemory(
        group, IDS, crops, image_size=SIZE, first_epoch=0, steps_per_epoch=PER_EPOCH, reset_epochs=RESET
    )
    if start is not None:
        memory.load(start)
    plan = sampling.training_plan(
        IDS,
        crops,
        seed=0,
        start_step=first,
        stop_step=last,
        batch_per_step=MICRO * COUNT,
        micro_batch=MICRO,
        rank=group.rank,
        world=group.world,
    )
    local = COUNT // group.world
    fed, states = {}, {}
    for step in range(first, last):
        for index in range(local):
            ids, _ = next(plan)
            keys = torch.from_numpy(rng.sample_keys(ids, 0, "attack", step).view(np.int64))
            noise = memory.of(index, torch.from_numpy(ids), keys, step)
            fed[step, group.rank * local + index] = noise.clone()
            noise.copy_((noise * 3 + torch.from_numpy(ids)[:, None, None, None] % 7 + 0.1).sin())
        if step + 1 in (*CUTS, last):
            states[step + 1] = memory.state()
    return fed, states


LAST = EPOCHS_TOTAL * PER_EPOCH


def _straight(group: Group) -> tuple[Fed, dict[int, State]]:
    return _steps(group, 0, LAST, None)


def _resumed(group: Group, states: dict[int, State]) -> dict[int, tuple[Fed, dict[int, State]]]:
    return {cut: _steps(group, cut, LAST, states[cut]) for cut in CUTS}


def _joined(parts: list[Fed]) -> Fed:
    return {key: noise for part in parts for key, noise in part.items()}


@functools.cache
def straight(world: int) -> tuple[Fed, dict[int, State]]:
    results = run_group(world, _straight)
    return _joined([fed for fed, _ in results]), results[0][1]


def equal(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_the_setting_is_one_with_many_exchanges() -> None:
    assert len(IDS) % (MICRO * COUNT)
    assert PER_EPOCH * MICRO * COUNT > EXCHANGED


@pytest.mark.parametrize("world", WORLDS[1:])
def test_every_number_of_workers_remembers_the_same(world: int) -> None:
    (one_fed, one_states), (fed, states) = straight(1), straight(world)
    assert equal(one_fed, fed)
    assert states.keys() == one_states.keys() == {*CUTS, LAST}
    for step, state in states.items():
        assert equal(one_states[step], state), step
    last = states[LAST]
    assert last[VALUES].shape == (len(IDS), 3, SIZE, SIZE)
    assert set(last[EPOCHS].tolist()) >= {EPOCHS_TOTAL - 2, EPOCHS_TOTAL - 1}, "some were left out of the last epoch"


def test_all_workers_have_the_same_state() -> None:
    first, *others = [states[CUTS[0]] for _, states in run_group(4, _straight)]
    assert all(equal(first, other) for other in others)


@pytest.mark.parametrize("world", WORLDS)
def test_it_goes_on_from_any_step_on_any_number_of_workers(world: int) -> None:
    """The checkpoint of two workers, within an epoch, at its end and in the first step of one."""
    straight_fed, states = straight(2)
    results = run_group(world, _resumed, {cut: states[cut] for cut in CUTS})
    for cut in CUTS:
        fed = _joined([result[cut][0] for result in results])
        assert equal(fed, {key: noise for key, noise in straight_fed.items() if key[0] >= cut}), cut
        assert equal(results[0][cut][1][LAST], states[LAST]), cut
