"""The engine against plain PyTorch, and its state across world sizes and ZeRO stages."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.accelerator import get_accelerator
from torch.nn import functional as F

from pipeline.distributed import Group
from pipeline.models import build_network
from pipeline.models.pruning.scores import Scores
from pipeline.models.state import load_state, named_state, train_only, trained_parameters
from pipeline.recipe.phase import Phase
from pipeline.training.batchnorm import BatchStatistics
from pipeline.training.context import RunContext
from pipeline.training.engine import Engine
from tests.support.processes import run_group
from tests.support.small_recipe import small_recipe

pytestmark = pytest.mark.timeout(1000)
DEADLINE_S = 480
PHASES = {
    "sgd": Phase(epochs=1, lr=0.05, momentum=0.9, weight_decay=1e-3),
    "no momentum": Phase(epochs=1, lr=0.05, momentum=0.0, weight_decay=1e-3),
    "adam": Phase(epochs=1, lr=0.001, optimizer="adam", weight_decay=0.05),
    "decay of scores": Phase(epochs=1, lr=0.05, momentum=0.9, weight_decay=1e-3),
}
"""Adam's weight decay is large, so that a decoupled one would be seen."""
SCORE_DECAY = {"decay of scores": 0.1}
"""Where scores have a weight decay of their own: with the rates, which have none, three groups in the optimizer."""
MICRO, COUNT, STEPS = 8, 4, 3

State = dict[str, torch.Tensor]


def _batches(step: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(step)
    images = torch.rand(COUNT, MICRO, 3, 28, 28, generator=generator)
    labels = torch.randint(0, 10, (COUNT, MICRO), generator=generator)
    return list(zip(images, labels, strict=True))


def _network(recipe: Any, trains: str) -> tuple[Any, Scores | None]:
    network, scores = build_network(recipe.model, seed=3), None
    if trains != "weights":
        allocation = "learned" if trains == "rates" else "uniform"
        scores = Scores.attach(network, recipe.sparsity.keep_fractions[0], allocation)
    train_only(network, "weights" if trains.endswith("weights") else "scores")
    return network.train(), scores


def _train(
    group: Group,
    setting: tuple[str, str, int, str],
    steps: range,
    start: tuple[State, State] | None,
    deepspeed: dict[str, Any] | None = None,
) -> tuple[State, State]:
    """Some optimizer steps with the engine; returns (plain state, optimizer state)."""
    optimizer, trains, zero, precision = setting
    batch = {"batch_per_step": MICRO * COUNT, "micro_batch": MICRO}
    recipe = small_recipe(
        Path("."),
        batch=batch,
        engine={"zero_stage": zero, "precision": precision},
        sparsity={"score_weight_decay": SCORE_DECAY.get(optimizer)},
        deepspeed=deepspeed or {},
    )
    network, scores = _network(recipe, trains)
    if start is not None:
        load_state(network, start[0], scores)
    engine = Engine(network, scores, PHASES[optimizer], RunContext(recipe, Path("."), "token", group))
    if start is not None:
        engine.load(start[1])
    statistics = BatchStatistics(network, group)
    local = COUNT // group.world
    for step in steps:
        for images, labels in _batches(step)[group.rank * local : (group.rank + 1) * local]:
            engine.backward(F.cross_entropy(engine.forward(images).float(), labels))
            engine.advance()
        statistics.fold_in(torch.zeros(1, dtype=torch.float64))
        if scores is not None:
            scores.refresh()
    statistics.close()
    state = {name: tensor.detach().clone() for name, tensor in named_state(network).items()}
    optimizer_state = engine.state()
    engine.close()
    return state, optimizer_state


def _keep_input(seen: list[torch.Tensor]) -> Callable[[torch.nn.Module, Any], None]:
    def hook(module: torch.nn.Module, arguments: Any) -> None:
        seen.append(arguments[0].detach())

    return hook


def _torch_optimizer(name: str, network: torch.nn.Module) -> torch.optim.Optimizer:
    phase = PHASES[name]
    own = {"score": SCORE_DECAY.get(name, phase.weight_decay), "rate": 0.0}
    groups = [
        {"params": [parameter], "weight_decay": own.get(key.split("/")[0], phase.weight_decay)}
        for key, parameter in trained_parameters(network).items()
    ]
    if name == "adam":
        return torch.optim.Adam(groups, lr=phase.lr, weight_decay=phase.weight_decay)
    return torch.optim.SGD(groups, lr=phase.lr, momentum=phase.momentum, weight_decay=phase.weight_decay)


@cache
def _reference(trained_by: str, trains: str, memory: torch.memory_format) -> State:
    """The same steps in plain PyTorch: mean loss over the micro-batches, statistics averaged over them.

    Sums round as the weights lie in memory, and Adam's first steps are the signs of even the smallest gradients.
    """
    recipe = small_recipe(Path("."))
    network, scores = _network(recipe, trains)
    network.to(memory_format=memory)
    optimizer = _torch_optimizer(trained_by, network)
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
        if scores is not None:
            scores.refresh()
    for name, buffer in buffers.items():
        buffer["running_mean"].copy_(running[name][0])
        buffer["running_var"].copy_(running[name][1])
        buffer["num_batches_tracked"].fill_(STEPS)
    return {name: tensor.detach().clone() for name, tensor in named_state(network).items()}


def _memory(workers: int, zero: int) -> torch.memory_format:
    """ZeRO has the weights in flat tensors, and is off for one worker."""
    return torch.channels_last if workers == 1 or zero == 0 else torch.contiguous_format


SETTINGS = [
    *(("sgd", t, z, p) for t in ("weights", "scores") for z in (0, 1, 2) for p in ("fp32", "bf16")),
    *(("adam", "weights", z, p) for z in (0, 1, 2) for p in ("fp32", "bf16")),
    ("adam", "scores", 1, "fp32"),
    ("no momentum", "weights", 1, "fp32"),
    *(("sgd", "kept weights", zero, "fp32") for zero in (0, 1, 2)),
    *(("decay of scores", "rates", zero, "fp32") for zero in (0, 1, 2)),
]
"""optimizer, what trains, ZeRO stage, precision. rates: scores, and the rates of the learned allocation; kept weights:
those that masks keep, as in finetuning."""
MOVED = [("sgd", "weights"), ("sgd", "scores"), ("adam", "weights"), ("decay of scores", "rates")]
"""optimizer, what trains: continued elsewhere"""

Trained = dict[Any, tuple[State, State]]


def _straight(group: Group) -> Trained:
    """Three steps at every setting."""
    return {setting: _train(group, setting, range(STEPS), None) for setting in SETTINGS}


def _moved(group: Group, starts: Trained, stages: tuple[int, ...]) -> Trained:
    """The third step of `starts`, which came from elsewhere."""
    return {
        (*how, group.world, zero): _train(group, (*how, zero, "fp32"), range(2, STEPS), start)
        for how, start in starts.items()
        for zero in stages
    }


def _two_workers(group: Group) -> tuple[Trained, Trained, Trained, Trained]:
    """Three steps; two steps; those two continued with the third in a new engine, and those of ZeRO 2 at others."""
    cut = {setting: _train(group, setting, range(2), None) for setting in SETTINGS}
    resumed = {setting: _train(group, setting, range(2, STEPS), start) for setting, start in cut.items()}
    starts = {how: cut[*how, 2, "fp32"] for how in MOVED}
    return _straight(group), cut, resumed, _moved(group, starts, (0, 1))


def _one_worker(group: Group, starts: Trained) -> tuple[Trained, Trained]:
    return _straight(group), _moved(group, starts, (2,))


@pytest.fixture(scope="module")
def trained() -> dict[str, Trained]:
    """Everything that needs processes, in one group of two and one of one: starting them is what takes time."""
    two, cut, resumed, other_stage = run_group(2, _two_workers, deadline_s=DEADLINE_S)[0]
    starts = {how: cut[*how, 2, "fp32"] for how in MOVED}
    one, alone = run_group(1, _one_worker, starts, deadline_s=DEADLINE_S)[0]
    return {"one": one, "two": two, "cut": cut, "resumed": resumed, "moved": other_stage | alone}


def _assert_close(state: State, reference: State, setting: Any, relative: float, absolute: float) -> None:
    assert state.keys() == reference.keys()
    for name, tensor in reference.items():
        torch.testing.assert_close(
            state[name], tensor, rtol=relative, atol=absolute, msg=lambda m, n=name: f"{setting} {n}: {m}"
        )


@pytest.mark.parametrize("workers", ["one", "two"])
@pytest.mark.parametrize("setting", SETTINGS)
def test_steps_equal_plain_pytorch(
    trained: dict[str, Trained], workers: str, setting: tuple[str, str, int, str]
) -> None:
    optimizer, trains, zero, precision = setting
    state, _ = trained[workers][setting]
    relative, absolute = (1e-4, 2e-6) if precision == "fp32" else (0.05, 0.05)
    reference = _reference(optimizer, trains, _memory(1 if workers == "one" else 2, zero))
    _assert_close(state, reference, (workers, *setting), relative, absolute)


@pytest.mark.parametrize("setting", SETTINGS)
def test_resume_is_exact(trained: dict[str, Trained], setting: tuple[str, str, int, str]) -> None:
    """Stopping after two steps and resuming in a new engine equals going straight through, bit for bit."""
    for straight, resumed in zip(trained["two"][setting], trained["resumed"][setting], strict=True):
        assert straight.keys() == resumed.keys()
        for name, tensor in straight.items():
            assert torch.equal(tensor, resumed[name]), name
    before, after = trained["cut"][setting][0], trained["two"][setting][0]
    assert any(not torch.equal(before[name], after[name]) for name in before), "the third step did nothing"


@pytest.mark.parametrize(("workers", "zero"), [(2, 0), (2, 1), (1, 2)])
@pytest.mark.parametrize("how", MOVED)
def test_state_moves_to_another_world_size_and_stage(
    trained: dict[str, Trained], how: tuple[str, str], workers: int, zero: int
) -> None:
    """Two workers at ZeRO 2 for two steps, then others or another stage: the third step is plain PyTorch's."""
    moved = trained["moved"][*how, workers, zero][0]
    _assert_close(moved, _reference(*how, _memory(2, 2)), (*how, workers, zero), 1e-4, 2e-6)


@pytest.mark.parametrize("setting", [setting for setting in SETTINGS if setting[0] == "adam"])
def test_adam_counts_its_steps(trained: dict[str, Trained], setting: tuple[str, str, int, str]) -> None:
    """Bias correction is by the count of all steps, also of those before a resume."""
    counts = {name: int(t) for name, t in trained["resumed"][setting][1].items() if name.endswith("/step")}
    assert set(counts.values()) == {STEPS}
    slots = {name.rsplit("/", 1)[1] for name in trained["resumed"][setting][1]}
    assert slots == {"exp_avg", "exp_avg_sq", "step"}


@pytest.mark.parametrize("setting", [setting for setting in SETTINGS if setting[:2] == ("adam", "weights")])
def test_adam_moves_in_pytorchs_direction(trained: dict[str, Trained], setting: tuple[str, str, int, str]) -> None:
    """Its steps are short, so that in bf16 the way that they go says more than where they end."""
    network, _ = _network(small_recipe(Path(".")), "weights")
    end, reference = trained["two"][setting][0], _reference("adam", "weights", _memory(2, setting[2]))
    for name, start in trained_parameters(network).items():
        ways = [(state[name] - start.detach()).flatten() for state in (end, reference)]
        assert F.cosine_similarity(*ways, dim=0) > 0.9, name


def _overlapped(group: Group) -> dict[int, list[State]]:
    """ZeRO stage -> the weights after three steps; gradients sent at once, in pieces, and in pieces during backward."""
    small = {"reduce_bucket_size": 1000, "allgather_bucket_size": 1000}
    options: list[dict[str, Any]] = [{}, small, {**small, "overlap_comm": True}]
    return {
        zero: [
            _train(group, ("sgd", "weights", zero, "fp32"), range(STEPS), None, {"zero_optimization": option})[0]
            for option in options
        ]
        for zero in (1, 2)
    }


def test_neither_buckets_nor_sending_during_backward_change_two_workers_step() -> None:
    """A sum of two has no order. On a CPU DeepSpeed's other buffers are used, but nothing happens at the same time."""
    for states in run_group(2, _overlapped, deadline_s=DEADLINE_S):
        for zero, (whole, *others) in states.items():
            for number, other in enumerate(others):
                for name, tensor in whole.items():
                    assert torch.equal(other[name], tensor), (zero, number, name)


def _odd(group: Group) -> dict[int, tuple[int, int]]:
    """ZeRO stage -> the number of trained parameters, and how often DeepSpeed waited for the device in four steps."""
    accelerator: Any = get_accelerator()
    waits = [0]

    def synchronize(*_: Any) -> None:
        waits[0] += 1

    accelerator.synchronize = synchronize  # the process is this test's own
    results = {}
    for zero in (0, 1, 2):
        batch = {"batch_per_step": MICRO * COUNT, "micro_batch": MICRO}
        recipe = small_recipe(Path("."), batch=batch, engine={"zero_stage": zero}, model={"num_classes": 11})
        network, _ = _network(recipe, "weights")
        engine = Engine(network, None, PHASES["sgd"], RunContext(recipe, Path("."), "token", group))
        waits[0] = 0
        for step in range(4):  # the timer would begin with the third
            for images, labels in _batches(step)[: COUNT // group.world]:
                engine.backward(F.cross_entropy(engine.forward(images).float(), labels))
                assert engine.advance()
        results[zero] = sum(p.numel() for p in trained_parameters(network).values()), waits[0]
        engine.close()
        hooks = [h for m in network.modules() for h in (m._forward_hooks, m._forward_pre_hooks) if h]
        assert hooks == [], "the network would keep a finished engine alive"
    return results


def test_an_odd_number_of_parameters_trains_and_nothing_waits_for_the_device() -> None:
    for results in run_group(2, _odd, deadline_s=DEADLINE_S):
        assert [waits for _, waits in results.values()] == [0, 0, 0]
        assert all(trained % 2 for trained, _ in results.values())


def _poisoned(group: Group, zero: int, precision: str, odd: float) -> tuple[list[bool], bool]:
    """What each call of advance returned in two steps, when rank 1's last gradient of the second is `odd`; and whether
    parameters and momenta stood still in that one."""
    batch = {"batch_per_step": MICRO * COUNT, "micro_batch": MICRO}
    recipe = small_recipe(Path("."), batch=batch, engine={"zero_stage": zero, "precision": precision})
    network, scores = _network(recipe, "weights")
    parameters = trained_parameters(network)
    engine = Engine(network, scores, PHASES["sgd"], RunContext(recipe, Path("."), "token", group))

    def state() -> State:
        return {**{name: p.detach().clone() for name, p in parameters.items()}, **engine.state()}

    def take(step: int, spoiled: int | None) -> list[bool]:
        answers, local = [], COUNT // group.world
        for index in range(local):
            images, labels = _batches(step)[group.rank * local + index]
            loss = F.cross_entropy(engine.forward(images).float(), labels)
            assert torch.isfinite(loss)
            handles = []
            if group.rank == 1 and index == spoiled:
                handles = [
                    next(iter(parameters.values())).register_hook(lambda gradient: torch.full_like(gradient, odd))
                ]
            engine.backward(loss)
            for handle in handles:
                handle.remove()
            answers.append(engine.advance())
        return answers

    answers = take(0, None)
    before = state()
    answers += take(1, COUNT // group.world - 1)
    after = state()
    engine.close()
    return answers, all(torch.equal(before[name], after[name]) for name in before)


def _all_poisoned(group: Group) -> dict[tuple[int, str, float], tuple[list[bool], bool]]:
    settings = [(0, "fp32", math.inf), (0, "bf16", math.nan), (1, "fp32", math.nan), (1, "bf16", math.inf)]
    return {setting: _poisoned(group, *setting) for setting in [*settings, (2, "fp32", math.inf)]}


def test_a_non_finite_gradient_moves_nothing_and_every_rank_knows() -> None:
    for results in run_group(2, _all_poisoned, deadline_s=DEADLINE_S):
        assert len(results) == 5
        for setting, (answers, still) in results.items():
            assert answers == [True, True, True, False], setting
            assert still, setting
