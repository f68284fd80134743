"""What a step sends: ZeRO's own collectives and one more, however strong the attack is."""

from __future__ import annotations

import math
from collections import Counter

import torch
from torch.profiler import ProfilerActivity, profile

from pipeline.data.loading.loader import Batch
from pipeline.distributed import Group
from tests.bench.real_step import RealStep, Trains, recipe_of
from tests.bench.scaling import Sent
from tests.support.processes import run_group

MICRO, PARTS = 4, 4
OWN = Counter({"c10d::_allgather_base_": 1})
"""BatchNorm's statistics, the metrics' sums and the stop flag, in one."""
ZERO = {
    0: Counter({"c10d::allreduce_": 1}),  # the gradients
    1: Counter({"c10d::allreduce_": 2, "c10d::_allgather_base_": 1}),
    2: Counter({"c10d::allreduce_": 3, "c10d::_allgather_base_": 1}),  # gradients after each of two micro-batches
}
"""What DeepSpeed adds per step by ZeRO stage, for gradients that fit one bucket."""
STEPS: tuple[tuple[str, Trains], ...] = (("clean", "weights"), ("pgd-3", "weights"), ("pgd-3", "scores"))


def _batch() -> Batch:
    return Batch(torch.randint(256, (MICRO, 3, 28, 28), dtype=torch.uint8), torch.arange(MICRO), torch.arange(MICRO))


def _sent(group: Group) -> dict[tuple[int, str], Counter[str]]:
    """(ZeRO stage, step) -> how often each collective is called."""
    batch, counts = _batch(), {}
    for zero in ZERO:
        for objective, trains in STEPS:
            recipe = recipe_of("small_cnn", objective, MICRO, PARTS, "fp32", zero)
            step = RealStep(recipe, group, batch, trains)
            step()
            with profile(activities=[ProfilerActivity.CPU]) as seen:
                step()
            names = [event.name for event in seen.events() or () if event.name.startswith("c10d::")]
            counts[zero, f"{objective}, {trains}"] = Counter(names)
    return counts


def test_collectives_of_a_step() -> None:
    for counts in run_group(2, _sent):
        assert len(counts) == len(ZERO) * len(STEPS)
        for (zero, step), sent in counts.items():
            assert sent == OWN + ZERO[zero], (zero, step)


def _elements(group: Group, trains: Trains = "weights") -> dict[str, list[int]]:
    """precision -> how many elements each collective of a step takes from this worker."""
    sizes = {}
    for precision in ("fp32", "bf16"):
        step = RealStep(recipe_of("small_cnn", "clean", MICRO, PARTS, precision), group, _batch(), trains)
        step()
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as seen:
            step()
        taken = [event.input_shapes[0] for event in seen.events() or () if event.name.startswith("gloo:all_")]
        sizes[precision] = [math.prod(shape) for shape in taken if shape]
    return sizes


def test_the_scaling_models_bytes_are_those_of_a_step() -> None:
    """In the order of a step: gradients, by precision; statistics of two micro-batches and five sums; weights."""
    world, own_sums = 2, 10
    for sizes in run_group(world, _elements):
        for precision, elements in sizes.items():
            sent = Sent.of(recipe_of("small_cnn", "clean", MICRO, PARTS, precision))
            *gradients, statistics, weights = elements
            bytes_each = {1: [4], 2: [2, 4]}[len(gradients)]
            assert sum(n * b for n, b in zip(gradients, bytes_each, strict=True)) == sent.gradients
            assert 4 * (statistics - own_sums) == PARTS // world * sent.statistics
            assert 4 * weights * world == sent.weights


def test_masked_layers_send_fp32_whatever_the_precision() -> None:
    """DeepSpeed sends bf16 for layers of the classes that it lists, and a layer with a mask is of another class."""
    for trains in ("scores", "kept weights"):
        for sizes in run_group(2, _elements, trains):
            assert sizes["bf16"] == sizes["fp32"], trains
