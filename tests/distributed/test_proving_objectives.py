"""Training by bounds through the engine: the bare network's bounds and the engine's forward give one gradient."""

from __future__ import annotations

from contextlib import nullcontext
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pipeline.distributed import Group
from pipeline.models.pruning.scores import Scores
from pipeline.models.state import named_state, train_only, trained_parameters
from pipeline.recipe.phase import Phase
from pipeline.recipe.threat_model import ThreatModel
from pipeline.rng import sample_keys
from pipeline.robustness.objectives import Objective, ObjectiveInput, build_objective
from pipeline.training.context import RunContext
from pipeline.training.engine import Engine
from tests.support.processes import run_group
from tests.support.small_recipe import small_recipe
from tests.support.techniques import objective_of

PHASE = Phase(epochs=1, lr=0.05, momentum=0.9, weight_decay=1e-3)
MICRO, COUNT, STEPS, SIDE = 4, 4, 3, 8
OBJECTIVES = {
    "crown_ibp": {"eps_ramp": 0.5, "crown_end": 0.5},
    "mixtrain": {"eps_ramp": 0.5, "robust_samples": 2, "robust_probability": 0.6},
}
CASES = [
    (name, trains, zero, precision)
    for name in OBJECTIVES
    for trains in ("weights", "scores")
    for zero, precision in ((0, "fp32"), (1, "fp32"), (2, "fp32"), (1, "bf16"))
]
"""objective, what trains, ZeRO stage, precision"""


def _objective(name: str) -> Objective:
    return build_objective(
        objective_of(name, **OBJECTIVES[name]), ThreatModel(norm="linf", eps=Fraction(1, 20)), "pretrain"
    )


def _network(trains: str) -> tuple[nn.Module, Scores | None]:
    scores = None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        network = nn.Sequential(
            nn.Conv2d(3, 4, 4, stride=2), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(36, 10)
        )
    if trains == "scores":
        scores = Scores.attach(network, Decimal("0.5"))
    train_only(network, "scores" if trains == "scores" else "weights")
    return network.train(), scores


def _objective_input(network: nn.Module, forward: Any, autocast: Any, step: int, number: int) -> ObjectiveInput:
    generator = torch.Generator().manual_seed(100 * step + number)
    images = torch.rand(MICRO, 3, SIDE, SIDE, generator=generator)
    labels = torch.randint(0, 10, (MICRO,), generator=generator)
    keys = torch.from_numpy(sample_keys(torch.arange(MICRO).numpy(), step, "attack", number).view("int64"))
    return ObjectiveInput(network, forward, images, labels, keys, autocast, elapsed=step / STEPS)


def _train(group: Group, name: str, trains: str, zero: int, precision: str) -> dict[str, torch.Tensor]:
    batch = {"batch_per_step": MICRO * COUNT, "micro_batch": MICRO}
    recipe = small_recipe(Path("."), batch=batch, engine={"zero_stage": zero, "precision": precision})
    (network, scores), objective = _network(trains), _objective(name)
    engine = Engine(network, scores, PHASE, RunContext(recipe, Path("."), "token", group))
    local = COUNT // group.world
    for step in range(STEPS):
        for number in range(group.rank * local, (group.rank + 1) * local):
            engine.backward(objective(_objective_input(network, engine.forward, engine.autocast, step, number)).loss)
            engine.advance()
        if scores is not None:
            scores.refresh()
    parameters = {name: tensor.detach().clone() for name, tensor in trained_parameters(network).items()}
    engine.close()
    return parameters


def _train_all(group: Group) -> dict[Any, dict[str, torch.Tensor]]:
    return {case: _train(group, *case) for case in CASES}


@pytest.fixture(scope="module")
def trained() -> dict[Any, dict[str, torch.Tensor]]:
    first, second = run_group(2, _train_all)
    for case in CASES:
        assert all(torch.equal(tensor, second[case][name]) for name, tensor in first[case].items()), case
    return first


def _reference(name: str, trains: str) -> dict[str, torch.Tensor]:
    """The same steps in plain PyTorch, on one network without an engine, in one process."""
    (network, scores), objective = _network(trains), _objective(name)
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=PHASE.lr, momentum=PHASE.momentum, weight_decay=PHASE.weight_decay)
    for step in range(STEPS):
        optimizer.zero_grad()
        for number in range(COUNT):
            inputs = _objective_input(network, network, nullcontext, step, number)
            (objective(inputs).loss / COUNT).backward()
        optimizer.step()
        if scores is not None:
            scores.refresh()
    return {name: tensor.detach().clone() for name, tensor in trained_parameters(network).items()}


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_two_workers_equal_plain_pytorch(trained: dict[Any, dict[str, torch.Tensor]], case: Any) -> None:
    name, trains, _, precision = case
    reference, start = _reference(name, trains), named_state(_network(trains)[0])
    relative, absolute = (1e-4, 2e-6) if precision == "fp32" else (0.05, 0.02)
    for key, tensor in reference.items():
        assert not torch.equal(tensor, start[key]), f"{key} was not trained"
        torch.testing.assert_close(
            trained[case][key], tensor, rtol=relative, atol=absolute, msg=lambda m, key=key: f"{case} {key}: {m}"
        )
