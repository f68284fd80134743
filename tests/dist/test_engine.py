"""The engine against plain PyTorch, and its state across world sizes and ZeRO stages."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from pipeline.batch_statistics import BatchStatistics
from pipeline.engine import Engine
from pipeline.group import Group
from pipeline.models import build_network
from pipeline.recipe_sections import Phase
from pipeline.sparsity import attach_scores, load_state, named_state, refresh_masks, train_only, trained_parameters
from tests.dist.processes import run_group
from tests.small_recipe import small_recipe

PHASE = Phase(epochs=1, lr=0.05, momentum=0.9, weight_decay=1e-3)
SCORE_DECAY = 0.1
MICRO, COUNT, STEPS = 8, 4, 3

State = dict[str, torch.Tensor]


def _batches(step: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(step)
    images = torch.rand(COUNT, MICRO, 3, 28, 28, generator=generator)
    labels = torch.randint(0, 10, (COUNT, MICRO), generator=generator)
    return list(zip(images, labels, strict=True))


def _network(recipe: Any, trains: str) -> Any:
    network = build_network(recipe.model, seed=3)
    if trains != "weights":
        attach_scores(network, recipe.sparsity.keep_fractions[0], "learned" if trains == "rates" else "uniform")
    train_only(network, "weights" if trains == "weights" else "scores")
    return network.train()


def _train(
    group: Group, zero: int, precision: str, trains: str, steps: range, start: tuple[State, State] | None
) -> tuple[State, State]:
    """Some optimizer steps with the engine; returns (plain state, optimizer state)."""
    batch = {"batch_per_step": MICRO * COUNT, "micro_batch": MICRO}
    engine_section = {"zero_stage": zero, "precision": precision}
    sparsity = {"score_weight_decay": SCORE_DECAY if trains == "rates" else None}
    recipe = small_recipe(Path("."), batch=batch, engine=engine_section, sparsity=sparsity)
    network = _network(recipe, trains)
    if start is not None:
        load_state(network, start[0])
        refresh_masks(network)
    engine = Engine(network, trained_parameters(network), PHASE, recipe, group)
    if start is not None:
        engine.load_optimizer_state(start[1])
    statistics = BatchStatistics(network, group)
    local = COUNT // group.world
    for step in steps:
        for images, labels in _batches(step)[group.rank * local : (group.rank + 1) * local]:
            engine.backward(F.cross_entropy(engine.forward(images).float(), labels))
            engine.advance()
        statistics.fold_in()
        refresh_masks(network)
    statistics.close()
    state = {name: tensor.detach().clone() for name, tensor in named_state(network).items()}
    optimizer = engine.optimizer_state()
    engine.close()
    return state, optimizer


def _keep_input(seen: list[torch.Tensor]) -> Callable[[torch.nn.Module, Any], None]:
    def hook(module: torch.nn.Module, arguments: Any) -> None:
        seen.append(arguments[0].detach())

    return hook


def _reference(trains: str) -> State:
    """The same steps in plain PyTorch: mean loss over the micro-batches, statistics averaged over them."""
    recipe = small_recipe(Path("."))
    network = _network(recipe, trains)
    own = {"score": SCORE_DECAY, "rate": 0.0} if trains == "rates" else {}
    groups = [
        {"params": [parameter], "weight_decay": own.get(name.split("/")[0], PHASE.weight_decay)}
        for name, parameter in trained_parameters(network).items()
    ]
    optimizer = torch.optim.SGD(groups, lr=PHASE.lr, momentum=PHASE.momentum)
    layers = {n: m for n, m in network.named_modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)}
    buffers = {n: dict(m.named_buffers()) for n, m in layers.items()}
    running = {n: (b["running_mean"].clone(), b["running_var"].clone()) for n, b in buffers.items()}
    for step in range(STEPS):
        optimizer.zero_grad()
        inputs: dict[str, list[torch.Tensor]] = {n: [] for n in layers}
        hooks = [m.register_forward_pre_hook(_keep_input(inputs[n])) for n, m in layers.items()]
        for images, labels in _batches(step):
            (F.cross_entropy(network(images), labels) / COUNT).backward()
        for hook in hooks:
            hook.remove()
        for name, parameter in trained_parameters(network).items():
            if name.startswith("rate/") and parameter.grad is not None:
                parameter.grad /= COUNT  # it does not shrink with the loss
        for name, seen in inputs.items():
            columns = [x.transpose(0, 1).flatten(1) for x in seen]  # [channels, values]
            mean = torch.stack([x.mean(1) for x in columns]).mean(0)
            variance = torch.stack([x.var(1, unbiased=True) for x in columns]).mean(0)
            old_mean, old_variance = running[name]
            running[name] = (0.9 * old_mean + 0.1 * mean, 0.9 * old_variance + 0.1 * variance)
        optimizer.step()
        refresh_masks(network)
    for name, buffer in buffers.items():
        buffer["running_mean"].copy_(running[name][0])
        buffer["running_var"].copy_(running[name][1])
        buffer["num_batches_tracked"].fill_(STEPS)
    return {name: tensor.detach().clone() for name, tensor in named_state(network).items()}


TRAINS = ("weights", "scores", "rates")
"""rates: the learned allocation, and so three groups of parameters that differ in their weight decay."""
SETTINGS = [(t, z, p) for t in TRAINS for z in (0, 1, 2) for p in ("fp32", "bf16") if (t, p) != ("rates", "bf16")]

Trained = dict[Any, tuple[State, State]]


def _straight(group: Group) -> Trained:
    """Three steps at every setting."""
    return {(t, z, p): _train(group, z, p, t, range(STEPS), None) for t, z, p in SETTINGS}


def _two_workers(group: Group) -> tuple[Trained, Trained, Trained]:
    """Three steps; two steps; and those two continued with the third in a new engine."""
    cut = {(t, z, p): _train(group, z, p, t, range(2), None) for t, z, p in SETTINGS}
    resumed = {(t, z, p): _train(group, z, p, t, range(2, STEPS), cut[t, z, p]) for t, z, p in SETTINGS}
    return _straight(group), cut, resumed


def _one_worker(group: Group, starts: dict[str, tuple[State, State]]) -> tuple[Trained, Trained]:
    """Three steps; and the third step of `starts`, which came from elsewhere, at every ZeRO stage."""
    moved = {(t, z): _train(group, z, "fp32", t, range(2, STEPS), start) for t, start in starts.items() for z in (0, 1, 2)}
    return _straight(group), moved


@pytest.fixture(scope="module")
def trained() -> dict[str, Trained]:
    """Everything that needs processes, in one group of two and one of one: starting them is what takes time."""
    two, cut, resumed = run_group(2, _two_workers)[0]
    one, moved = run_group(1, _one_worker, {t: cut[t, 2, "fp32"] for t in TRAINS})[0]
    return {"one": one, "two": two, "cut": cut, "resumed": resumed, "moved": moved}


def _assert_close(state: State, reference: State, setting: Any, relative: float, absolute: float) -> None:
    assert state.keys() == reference.keys()
    for name, tensor in reference.items():
        torch.testing.assert_close(
            state[name], tensor, rtol=relative, atol=absolute, msg=lambda m, n=name: f"{setting} {n}: {m}"
        )


@pytest.mark.parametrize("workers", ["one", "two"])
@pytest.mark.parametrize(("trains", "zero", "precision"), SETTINGS)
def test_steps_equal_plain_pytorch(
    trained: dict[str, Trained], workers: str, trains: str, zero: int, precision: str
) -> None:
    state, _ = trained[workers][trains, zero, precision]
    relative, absolute = (1e-4, 2e-6) if precision == "fp32" else (0.05, 0.05)
    _assert_close(state, _reference(trains), (workers, trains, zero, precision), relative, absolute)


@pytest.mark.parametrize("setting", SETTINGS)
def test_resume_is_exact(trained: dict[str, Trained], setting: tuple[str, int, str]) -> None:
    """Stopping after two steps and going on in a new engine equals going straight through, bit for bit."""
    for straight, resumed in zip(trained["two"][setting], trained["resumed"][setting], strict=True):
        assert straight.keys() == resumed.keys()
        for name, tensor in straight.items():
            assert torch.equal(tensor, resumed[name]), name
    before, after = trained["cut"][setting][0], trained["two"][setting][0]
    assert any(not torch.equal(before[name], after[name]) for name in before), "the third step did nothing"


@pytest.mark.parametrize("zero", [0, 1, 2])
@pytest.mark.parametrize("trains", TRAINS)
def test_state_moves_to_another_world_size_and_stage(trained: dict[str, Trained], trains: str, zero: int) -> None:
    """Two workers at ZeRO 2 for two steps, then one worker at another stage: the third step agrees with plain PyTorch."""
    _assert_close(trained["moved"][trains, zero][0], _reference(trains), (trains, zero), 1e-4, 2e-6)
