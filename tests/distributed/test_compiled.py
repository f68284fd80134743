"""A compiled network against the same one as it is: equal steps, few compilations, and the same bits every time."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch._dynamo.utils import counters

from pipeline.data.loading.loader import Batch
from pipeline.distributed import Group
from pipeline.models.state import trained_parameters
from tests.bench.real_step import RealStep, Trains, recipe_of
from tests.support.processes import run_group

MICRO, PARTS, STEPS = 4, 2, 4

pytestmark = pytest.mark.timeout(1000)


@dataclass(frozen=True)
class Trained:
    """What some steps come to."""

    parameters: dict[str, torch.Tensor]
    masks: list[dict[str, torch.Tensor]]
    """Those of every step."""
    graphs: int
    """How often something was compiled."""
    breaks: dict[str, int]
    """Why it was not compiled in one piece."""


def _batch() -> Batch:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (MICRO, 3, 28, 28), dtype=torch.uint8, generator=generator)
    return Batch(images, torch.arange(MICRO), torch.arange(MICRO))


def _trained(group: Group, trains: Trains, precision: str, mode: str) -> Trained:
    counters.clear()
    step = RealStep(recipe_of("small_cnn", "pgd-3", MICRO, PARTS, precision, mode=mode), group, _batch(), trains)
    state, masks = step.training.state, []
    scores = state.network.scores
    for _ in range(STEPS):
        step()
        masks.append({name: mask.clone() for name, mask in scores.masks().items()} if scores is not None else {})
    parameters = {name: tensor.detach().clone() for name, tensor in trained_parameters(state.network.network).items()}
    state.engine.close()
    return Trained(parameters, masks, counters["stats"]["unique_graphs"], dict(counters["graph_break"]))


def _compiled_and_eager(group: Group, trains: Trains, precision: str) -> tuple[Trained, Trained]:
    return _trained(group, trains, precision, "compiled"), _trained(group, trains, precision, "eager")


def _compiled(group: Group, trains: Trains, precision: str) -> Trained:
    return _trained(group, trains, precision, "compiled")


@pytest.mark.parametrize(("world", "trains", "precision"), [(1, "weights", "fp32"), (2, "scores", "bf16")])
def test_compiled_steps(world: int, trains: Trains, precision: str) -> None:
    """Of one worker, where ZeRO is off, and of two; compiled once for the update and once for the attack."""
    (compiled, eager), *_ = run_group(world, _compiled_and_eager, trains, precision)
    tolerance = 1e-5 if precision == "fp32" else 2e-2
    for name, tensor in eager.parameters.items():
        torch.testing.assert_close(compiled.parameters[name], tensor, rtol=tolerance, atol=tolerance, msg=name)
    assert (compiled.graphs, eager.graphs) == (2, 0)
    assert compiled.breaks == {}
    if trains == "scores":
        first, *_, last = compiled.masks
        assert any(not torch.equal(mask, last[name]) for name, mask in first.items()), "nothing had to be recompiled"

    again, *_ = run_group(world, _compiled, trains, precision)
    assert all(torch.equal(tensor, again.parameters[name]) for name, tensor in compiled.parameters.items())
