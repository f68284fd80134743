"""Free adversarial training through the loop and the engine, against the algorithm written out in plain PyTorch."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.data.loading.loader import Batch
from pipeline.distributed import Group
from pipeline.models import Network, build_network
from pipeline.models.pruning.scores import Scores
from pipeline.models.state import train_only, trained_parameters
from pipeline.recipe.schema import Recipe
from pipeline.recipe.stages import Stage, stages_of
from pipeline.robustness.objectives import build_objective
from pipeline.run.checkpoint import Snapshot
from pipeline.run.progress import Progress
from pipeline.training.batches import NOISE, FreeNoise, replayed
from pipeline.training.context import RunContext
from pipeline.training.engine import Engine
from pipeline.training.loop import Training, train
from pipeline.training.stage_state import NetworkState, StageState, restored
from tests.support.processes import run_group
from tests.support.small_recipe import small_recipe

MICRO, COUNT, REPLAYS, BATCHES, EPOCHS = 8, 4, 3, 1, 2
PER_EPOCH = BATCHES * REPLAYS
STEPS = PER_EPOCH * EPOCHS
CUT = 4  # the second epoch's batch has had one of its three steps
PHASE = {"epochs": EPOCHS, "lr": 0.05, "momentum": 0.9, "weight_decay": 1e-3}
STEP_SIZE = {"linf": 1 / 20, "l2": 1 / 2}
EPS = {"linf": 1 / 10, "l2": 1.0}


@dataclass(frozen=True)
class Setting:
    norm: str
    trains: str = "weights"
    zero: int = 1
    precision: str = "fp32"


SETTINGS = [
    Setting("linf", zero=0),
    Setting("l2", zero=2),
    Setting("l2", trains="scores", zero=1),
    Setting("l2", zero=1, precision="bf16"),
]


def _recipe(setting: Setting) -> Recipe:
    step_size = f"1/{round(1 / STEP_SIZE[setting.norm])}"
    return small_recipe(
        Path("."),
        objective={"name": "free", "step_size": step_size, "replays": REPLAYS, "overfitting_guard": None},
        threat_model={"norm": setting.norm, "eps": EPS[setting.norm]},
        phases={"pretrain": PHASE, "prune": PHASE},
        batch={"batch_per_step": MICRO * COUNT, "micro_batch": MICRO},
        engine={"zero_stage": setting.zero, "precision": setting.precision},
        evaluation={"validation_steps": 0},
        checkpoint={"every_steps": CUT},
    )


def _stage(recipe: Recipe, setting: Setting) -> Stage:
    return next(stage for stage in stages_of(recipe) if stage.trains == setting.trains)


def _network(recipe: Recipe, setting: Setting) -> tuple[Network, Scores | None]:
    network, scores = build_network(recipe.model, seed=3), None
    if setting.trains == "scores":
        scores = Scores.attach(network, recipe.sparsity.keep_fractions[0])
    train_only(network, "scores" if setting.trains == "scores" else "weights")
    return network.train(), scores


def _batch(number: int) -> list[Batch]:
    """All micro-batches of one batch."""
    generator = torch.Generator().manual_seed(number)
    images = torch.randint(0, 256, (COUNT, MICRO, 3, 28, 28), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, 10, (COUNT, MICRO), generator=generator)
    ids = torch.arange(COUNT * MICRO).view(COUNT, MICRO)
    return [Batch(*parts) for parts in zip(images, labels, ids, strict=True)]


def _train(group: Group, setting: Setting, start: Snapshot | None = None) -> dict[int, Snapshot]:
    """From the beginning, or from where a snapshot was taken, to the end; step -> what a checkpoint would hold."""
    recipe = _recipe(setting)
    stage, (network, scores) = _stage(recipe, setting), _network(recipe, setting)
    progress = start.progress if start is not None else Progress(0, PER_EPOCH, STEPS)
    context = RunContext(recipe, Path("."), "token", group)
    state = StageState(
        network=restored(NetworkState(network, scores), start),
        engine=restored(Engine(network, scores, stage.optimisation, context), start),
        noise=restored(FreeNoise(context), start),
    )
    local = COUNT // group.world
    saved: dict[int, Snapshot] = {}

    def reading() -> Iterator[Batch]:
        for number in range(progress.step // REPLAYS, BATCHES * EPOCHS):
            yield from _batch(number)[group.rank * local : (group.rank + 1) * local]

    def save(snapshot: Snapshot) -> None:
        saved[snapshot.progress.step] = snapshot

    training = Training(
        stage=stage,
        context=context,
        state=state,
        objective=build_objective(stage.objective, recipe.threat_model, stage.phase),
        micro_batches=replayed(reading(), local, REPLAYS, progress.step),
        rows=None,
        validate=lambda strength: {},
        save=save,
    )
    assert train(training, progress).finished
    state.engine.close()
    return saved


@functools.cache
def _reference(setting: Setting) -> dict[str, Tensor]:
    """Algorithm 1 of Shafahi et al. with SGD written out: state, momenta and noise after all steps."""
    recipe = _recipe(setting)
    network, scores = _network(recipe, setting)
    parameters = trained_parameters(network)
    velocity = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    noise = torch.zeros(COUNT, MICRO, 3, 28, 28)
    eps, step_size, step = EPS[setting.norm], STEP_SIZE[setting.norm], 0
    for epoch in range(EPOCHS):
        for number in range(BATCHES):
            for _ in range(REPLAYS):
                lr = PHASE["lr"] * (1 + math.cos(math.pi * step / STEPS)) / 2
                total: dict[str, Tensor] = {name: torch.zeros_like(p) for name, p in parameters.items()}
                for n, micro_batch in enumerate(_batch(epoch * BATCHES + number)):
                    delta = noise[n].clone().requires_grad_(True)
                    with torch.autocast("cpu", torch.bfloat16, enabled=setting.precision == "bf16"):
                        logits = network(torch.clamp(micro_batch.images / 255 + delta, 0, 1))
                    loss = F.cross_entropy(logits.float(), micro_batch.labels)
                    *grads, towards = torch.autograd.grad(loss, [*parameters.values(), delta])
                    for name, grad in zip(parameters, grads, strict=True):
                        total[name] += grad / COUNT
                    if setting.norm == "linf":
                        noise[n] = torch.clamp(noise[n] + step_size * towards.sign(), -eps, eps)
                    else:
                        length = towards.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
                        moved = noise[n] + step_size * towards / length
                        length = moved.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
                        noise[n] = torch.where(length > eps, moved * eps / length, moved)
                with torch.no_grad():
                    for name, parameter in parameters.items():
                        velocity[name] = 0.9 * velocity[name] + total[name] + 1e-3 * parameter
                        parameter -= lr * velocity[name]
                if scores is not None:
                    scores.refresh()
                step += 1
    weights = {name: parameter.detach() for name, parameter in parameters.items()}
    return weights | {f"optim/{name}/momentum_buffer": v for name, v in velocity.items()} | {NOISE: noise}


Ends = dict[Setting, Snapshot]


def _two_workers(group: Group) -> tuple[Ends, Ends, Ends]:
    """At the cut; at the end; and at the end when the rest was done by another engine."""
    runs = {setting: _train(group, setting) for setting in SETTINGS}
    cut, ends = ({setting: run[step] for setting, run in runs.items()} for step in (CUT, STEPS))
    return cut, ends, {setting: _train(group, setting, cut[setting])[STEPS] for setting in SETTINGS}


def _one_worker(group: Group, cut: Ends) -> tuple[Ends, Ends]:
    """At the end; and at the end from where two workers were cut."""
    ends = {setting: _train(group, setting)[STEPS] for setting in SETTINGS}
    return ends, {setting: _train(group, setting, cut[setting])[STEPS] for setting in SETTINGS}


@pytest.fixture(scope="module")
def trained() -> dict[str, Ends]:
    cut, two, resumed = run_group(2, _two_workers)[0]
    one, moved = run_group(1, _one_worker, cut)[0]
    return {"one": one, "two": two, "resumed": resumed, "moved": moved, "cut": cut}


def _everything(snapshot: Snapshot) -> dict[str, Tensor]:
    return snapshot.model | snapshot.train_state


@pytest.mark.parametrize("workers", ["one", "two", "moved"])
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_equals_the_algorithm_written_out(trained: dict[str, Ends], workers: str, setting: Setting) -> None:
    """Weights or scores, momenta, and the noise of every place of the global batch."""
    actual, expected = _everything(trained[workers][setting]), _reference(setting)
    for name, tensor in expected.items():
        off = actual[name] - tensor
        if setting.precision == "bf16":  # DeepSpeed also reduces gradients in it
            assert float(off.norm()) < 0.2 * float(tensor.norm()), name
        elif setting.norm == "linf" and name == NOISE:  # a gradient of about 0 may have either sign
            assert float((off.abs() > 1e-6).float().mean()) < 1e-3
        else:
            torch.testing.assert_close(actual[name], tensor, rtol=1e-4, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}")
    assert float(expected[NOISE].abs().max()) > 0.9 * EPS["linf"]


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_stopped_between_replays_it_resumes_bit_for_bit(trained: dict[str, Ends], setting: Setting) -> None:
    straight, resumed = _everything(trained["two"][setting]), _everything(trained["resumed"][setting])
    assert straight.keys() == resumed.keys()
    assert [name for name, tensor in straight.items() if not torch.equal(tensor, resumed[name])] == []
    before = _everything(trained["cut"][setting])
    assert not torch.equal(before[NOISE], straight[NOISE]), "the last steps did nothing"


def test_one_forward_a_step_moves_batchnorm(trained: dict[str, Ends]) -> None:
    for ends in (trained["one"], trained["two"]):
        counted = ends[SETTINGS[0]].model["buffer/bn1.num_batches_tracked"]
        assert int(counted) == STEPS
