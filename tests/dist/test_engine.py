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
from pipeline.recipe import Phase
from pipeline.sparsity import attach_scores, load_state, named_state, refresh_masks, train_only, trained_parameters
from tests.dist.processes import run_group
from tests.small_recipe import small_recipe

PHASE = Phase(epochs=1, lr=0.05, momentum=0.9, weight_decay=1e-3)
MICRO, COUNT, STEPS = 8, 4, 3

State = dict[str, torch.Tensor]


def _batches(step: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(step)
    images = torch.rand(COUNT, MICRO, 3, 28, 28, generator=generator)
    labels = torch.randint(0, 10, (COUNT, MICRO), generator=generator)
    return list(zip(images, labels, strict=True))


def _network(recipe: Any, trains: str) -> Any:
    network = build_network(recipe.model, seed=3)
    if trains == "scores":
        attach_scores(network, recipe.sparsity.keep_fractions[0])
    train_only(network, "scores" if trains == "scores" else "weights")
    return network.train()


def _train(
    group: Group, zero: int, precision: str, trains: str, steps: range, start: tuple[State, State] | None
) -> tuple[State, State]:
    """Some optimizer steps with the engine; returns (plain state, optimizer state)."""
    batch = {"batch_per_step": MICRO * COUNT, "micro_batch": MICRO}
    recipe = small_recipe(Path("."), batch=batch, engine={"zero_stage": zero, "precision": precision})
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
    parameters = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=PHASE.lr, momentum=PHASE.momentum, weight_decay=PHASE.weight_decay)
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


def _all_settings(group: Group) -> list[tuple[Any, State, State]]:
    found = []
    for trains in ("weights", "scores"):
        for zero in (0, 1, 2):
            for precision in ("fp32", "bf16"):
                found.append(((trains, zero, precision), *_train(group, zero, precision, trains, range(STEPS), None)))
    return found


def _resumed(group: Group, zero: int, trains: str, start: tuple[State, State]) -> tuple[State, State]:
    return _train(group, zero, "fp32", trains, range(2, STEPS), start)


def _cut_and_resume(group: Group) -> list[tuple[Any, bool]]:
    """Stop after two steps and go on in a new engine, at every stage: must equal going straight through, bit for bit."""
    same = []
    for trains in ("weights", "scores"):
        for zero in (0, 1, 2):
            for precision in ("fp32", "bf16"):
                straight = _train(group, zero, precision, trains, range(STEPS), None)
                cut = _train(group, zero, precision, trains, range(2), None)
                resumed = _train(group, zero, precision, trains, range(2, STEPS), cut)
                equal = all(
                    torch.equal(a[name], b[name]) for a, b in zip(straight, resumed, strict=True) for name in a
                )
                moved = not all(torch.equal(cut[0][name], straight[0][name]) for name in cut[0])
                same.append(((trains, zero, precision), equal and moved))
    return same


@pytest.mark.parametrize("world", [1, 2])
def test_steps_equal_plain_pytorch(world: int) -> None:
    for (trains, zero, precision), state, _ in run_group(world, _all_settings)[0]:
        reference = _reference(trains)
        assert state.keys() == reference.keys()
        for name in reference:
            relative, absolute = (1e-4, 2e-6) if precision == "fp32" else (0.05, 0.05)
            torch.testing.assert_close(
                state[name], reference[name], rtol=relative, atol=absolute, msg=lambda m, n=name: f"{trains} zero {zero} {precision} {n}: {m}"
            )


def test_resume_is_exact_at_every_zero_stage() -> None:
    for setting, equal in run_group(2, _cut_and_resume)[0]:
        assert equal, setting


def _two_steps(group: Group, zero: int, trains: str) -> tuple[State, State]:
    return _train(group, zero, "fp32", trains, range(2), None)


def _resume_all(group: Group, starts: list[tuple[str, tuple[State, State]]]) -> list[State]:
    return [_resumed(group, zero, trains, start)[0] for trains, start in starts for zero in (0, 1, 2)]


def _two_steps_of_both(group: Group) -> list[tuple[str, tuple[State, State]]]:
    return [(trains, _two_steps(group, 2, trains)) for trains in ("weights", "scores")]


def test_state_moves_to_another_world_size_and_stage() -> None:
    """Two workers at ZeRO 2 for two steps, then one worker at ZeRO 0, 1 and 2: the third step agrees with plain PyTorch."""
    starts = run_group(2, _two_steps_of_both)[0]
    states = run_group(1, _resume_all, starts)[0]
    for index, state in enumerate(states):
        reference = _reference(starts[index // 3][0])
        for name in reference:
            torch.testing.assert_close(state[name], reference[name], rtol=1e-4, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}")
