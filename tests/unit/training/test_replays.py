"""Replayed batches begin right at any step, and noise belongs to places of the global batch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.loading.loader import Batch
from pipeline.distributed import Group
from pipeline.training.batches import NOISE, FreeNoise, replayed
from pipeline.training.context import RunContext
from tests.support.small_recipe import small_recipe

CPU = torch.device("cpu")


def batch(number: int) -> Batch:
    return Batch(torch.full((1,), number), torch.zeros(1), torch.full((1,), number))


def numbers(batches: Iterator[Batch]) -> list[int]:
    return [int(one.ids) for one in batches]


@given(data_steps=st.integers(1, 5), per_step=st.integers(1, 4), times=st.integers(1, 5), share=st.floats(0, 1))
def test_from_any_step_on_it_is_what_is_left_of_the_whole(
    data_steps: int, per_step: int, times: int, share: float
) -> None:
    """Step t takes the micro-batches of batch t // times, written out; a start at any t leaves out those before."""
    steps = data_steps * times
    start = min(steps - 1, int(share * steps))
    expected = [t // times * per_step + n for t in range(start, steps) for n in range(per_step)]
    left = map(batch, range(start // times * per_step, data_steps * per_step))
    assert numbers(replayed(left, per_step, times, start)) == expected


def test_each_micro_batch_is_read_once_and_not_before_it_is_needed() -> None:
    read: list[int] = []

    def reading() -> Iterator[Batch]:
        for number in range(6):
            read.append(number)
            yield batch(number)

    feed = replayed(reading(), 3, 2, 0)
    seen = [(int(next(feed).ids), len(read)) for _ in range(9)]
    assert seen == [(0, 1), (1, 2), (2, 3), (0, 3), (1, 3), (2, 3), (3, 4), (4, 5), (5, 6)]
    kept = [one.ids for one in feed]
    assert len(kept) == 3
    assert read == list(range(6))


def noise_of(group: Group) -> FreeNoise:
    recipe = small_recipe(Path("."), batch={"batch_per_step": 24, "micro_batch": 4}, data={"image_size": 5})
    return FreeNoise(RunContext(recipe, Path("."), "token", group))


def test_noise_is_dealt_in_the_order_of_the_steps_micro_batches() -> None:
    whole = torch.arange(6 * 4 * 3 * 25, dtype=torch.float32).view(6, 4, 3, 5, 5)
    before = whole.clone()
    for world in (1, 2, 3, 6):
        parts = []
        for rank in range(world):
            noise, local = noise_of(Group(rank, world, CPU)), range(6 // world)
            initial = torch.stack([noise.of(number) for number in local])
            noise.load({NOISE: whole})
            parts.append(torch.stack([noise.of(number) for number in local]))
            assert (initial.shape, initial.dtype, bool(initial.any())) == (parts[-1].shape, torch.float32, False)
            for number in local:
                noise.of(number).zero_()
        assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(whole, before), "a part is a copy"


def test_a_checkpoints_noise_is_a_copy() -> None:
    noise = noise_of(Group(0, 1, CPU))
    expected = torch.rand(6, 4, 3, 5, 5)
    for number in range(6):
        noise.of(number).copy_(expected[number])
    state = noise.state()
    noise.of(0).zero_()
    assert state.keys() == {NOISE}
    assert torch.equal(state[NOISE], expected)
