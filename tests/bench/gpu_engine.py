"""The checks of `tests.bench.gpu_check` that step through DeepSpeed, in a process group of one."""

from __future__ import annotations

import gc
import itertools
import os
import weakref
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from pipeline.distributed import Group
from pipeline.models import build_network
from pipeline.models.pruning.scores import Scores
from pipeline.models.state import load_state, named_state, train_only, trained_parameters
from pipeline.recipe.phase import Phase
from pipeline.recipe.schema import Recipe
from pipeline.robustness.noise import device_keys
from pipeline.robustness.objectives import ObjectiveInput, build_objective
from pipeline.training.batchnorm import BatchStatistics
from tests.bench.alternate import alternate, ratio
from tests.bench.gpu_checks import Check, labels_of, random_images
from tests.support.small_recipe import small_recipe

State = dict[str, Tensor]
PHASE = Phase(epochs=1, lr=0.05, momentum=0.9, weight_decay=1e-4)
MICRO = 8
WAITS = ("aten::_local_scalar_dense", "aten::nonzero", "cudaStreamSynchronize", "cudaDeviceSynchronize")
"""Events for which the host waits until the GPU has finished."""
RESUMED = [(zero, precision) for zero in (0, 1, 2) for precision in ("fp32", "bf16")]


def group_of(where: torch.device) -> Group:
    """The process group of this process alone, without a port; made once."""
    if not dist.is_initialized():
        from pipeline.training.engine import prepare_deepspeed

        os.environ.setdefault("LOCAL_RANK", "0")  # required by DeepSpeed
        store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
        dist.init_process_group("nccl" if where.type == "cuda" else "gloo", store=store, rank=0, world_size=1)
        prepare_deepspeed(where)
    return Group(0, 1, where)


def engine_recipe(zero: int, precision: str, parts: int = 2, micro: int = MICRO, **sections: Any) -> Recipe:
    """ZeRO stays on for one worker if it has options of its own."""
    values: dict[str, Any] = {
        "batch": {"batch_per_step": micro * parts, "micro_batch": micro},
        "engine": {"zero_stage": zero, "precision": precision},
        "deepspeed": {"zero_optimization": {"overlap_comm": False}} if zero else {},
    }
    return small_recipe(Path("."), **(values | sections))


class Trainer:
    """Steps of prune, or of pretrain, by PGD-2 on random images, as the training loop takes them."""

    def __init__(
        self, where: torch.device, recipe: Recipe, start: tuple[State, State] | None = None, prunes: bool = True
    ) -> None:
        from pipeline.training.context import RunContext
        from pipeline.training.engine import Engine

        group = group_of(where)
        self.network = build_network(recipe.model, 0)
        self.scores = Scores.attach(self.network, recipe.sparsity.keep_fractions[0]) if prunes else None
        if start is not None:
            load_state(self.network, start[0], self.scores)
        self.network.to(where).train()
        train_only(self.network, "scores" if prunes else "weights")
        if self.scores is not None:
            self.scores.refresh()
        self.engine = Engine(self.network, self.scores, PHASE, RunContext(recipe, Path("."), "token", group))
        if start is not None:
            self.engine.load(start[1])
        self._statistics = BatchStatistics(self.engine.network, group)
        self._objective = build_objective(recipe.objective, recipe.threat_model, "prune")
        self._recipe, self._where = recipe, where

    def batches(self, number: int) -> list[ObjectiveInput]:
        """The micro-batches of a step, on the device."""
        batch, size, engine = self._recipe.batch, self._recipe.data.image_size, self.engine
        labels, ids = labels_of(batch.micro_batch, self._where), np.arange(batch.micro_batch)
        return [
            ObjectiveInput(
                engine.network,
                engine.forward,
                random_images(batch.micro_batch, size, self._where, seed=100 * number + part),
                labels,
                device_keys(ids + part, self._where, 0, "attack", number),
                engine.autocast,
            )
            for part in range(batch.micro_batches_per_step)
        ]

    def step(self, batches: list[ObjectiveInput], spoiled: bool = False) -> bool:
        """Whether the scores moved; `spoiled` makes one gradient of the last micro-batch NaN."""
        moved = True
        for part, batch in enumerate(batches):
            loss = self._objective(batch).loss
            handle = None
            if spoiled and part == len(batches) - 1:
                first = next(iter(trained_parameters(self.network).values()))
                handle = first.register_hook(lambda gradient: torch.full_like(gradient, float("nan")))
            self.engine.backward(loss)
            if handle is not None:
                handle.remove()
            moved = self.engine.advance()
        self._statistics.fold_in(torch.zeros(1, dtype=torch.float64, device=self._where))
        if self.scores is not None:
            self.scores.refresh()
        return moved

    def state(self) -> tuple[State, State]:
        """(the network's, the optimizer's), as copies on the CPU."""
        own = {name: tensor.detach().to("cpu", copy=True) for name, tensor in named_state(self.network).items()}
        return own, self.engine.state()

    def close(self) -> None:
        self._statistics.close()
        self.engine.close()


def assert_equal_states(one: tuple[State, State], other: tuple[State, State], what: str) -> None:
    for first, second in zip(one, other, strict=True):
        assert first.keys() == second.keys(), what
        for name, tensor in first.items():
            assert torch.equal(tensor, second[name]), f"{what}: {name} differs"


def _steps(where: torch.device, recipe: Recipe, numbers: range, start: tuple[State, State] | None = None) -> Any:
    trainer = Trainer(where, recipe, start)
    if start is not None:
        assert_equal_states(trainer.state(), start, "state out and in")
    for number in numbers:
        assert trainer.step(trainer.batches(number)), f"step {number} had a gradient that is not finite"
    state = trainer.state()
    trainer.close()
    return state


def _resume(where: torch.device) -> str:
    """State out and in is exact, and 3 + 3 steps equal 6, bit for bit."""
    for zero, precision in RESUMED:
        recipe = engine_recipe(zero, precision)
        cut = _steps(where, recipe, range(3))
        resumed = _steps(where, recipe, range(3, 6), cut)
        assert_equal_states(_steps(where, recipe, range(6)), resumed, f"ZeRO {zero}, {precision}")
        assert any(not torch.equal(cut[0][name], resumed[0][name]) for name in cut[0]), "nothing was trained"
    return f"3 + 3 steps equal 6, bit for bit, at ZeRO 0, 1 and 2, in fp32 and bf16 ({len(RESUMED)} settings)"


def _nan(where: torch.device) -> str:
    for zero in (0, 1, 2):
        trainer = Trainer(where, engine_recipe(zero, "fp32"))
        assert trainer.step(trainer.batches(0))
        before, _ = trainer.state()
        assert not trainer.step(trainer.batches(1), spoiled=True), f"ZeRO {zero}: the step says that all is well"
        after, _ = trainer.state()
        assert all(torch.equal(after[name], score) for name, score in before.items() if name.startswith("score/")), zero
        trainer.close()
    return "a NaN gradient moves nothing and is reported, at ZeRO 0, 1 and 2"


def _waits_per_step(where: torch.device, parts: int) -> dict[str, int]:
    trainer = Trainer(where, engine_recipe(0, "fp32", parts))
    for number in range(3):
        trainer.step(trainer.batches(number))
    batches = trainer.batches(3)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if where.type == "cuda" else [])]
    with profile(activities=activities) as profiler:
        trainer.step(batches)
    trainer.close()
    events = profiler.key_averages()
    return {name: sum(event.count for event in events if event.key == name) for name in WAITS}


def _waits(where: torch.device) -> str:
    few, many = _waits_per_step(where, 2), _waits_per_step(where, 6)
    more = {name: many[name] - few[name] for name in WAITS if many[name] > few[name]}
    assert not more, f"four more micro-batches wait more often: {more}"
    return "per step " + ", ".join(f"{name} {count}" for name, count in few.items()) + "; no more per micro-batch"


def _memory(where: torch.device) -> str:
    used = partial(torch.cuda.memory_allocated, where)
    gc.collect()
    before = used()
    trainer, after = Trainer(where, engine_recipe(1, "bf16")), []
    for number in itertools.count(1):
        trainer.step(trainer.batches(number))
        if number in (20, 200):
            after.append(used())
        if number == 200:
            break
    assert after[1] - after[0] <= 1 << 20, f"{after[0]} bytes after 20 steps, {after[1]} after 200"
    trainer.close()
    del trainer
    gc.collect()
    torch.cuda.empty_cache()
    kept = used() - before
    assert kept <= 1 << 20, f"{kept} bytes are kept after close"
    return f"{after[0] >> 20} MiB after 20 steps, as many after 200; {kept >> 10} KiB after close"


def _closed(where: torch.device) -> str:
    """Without a pass of the garbage collector over cycles with the network."""
    trainer = Trainer(where, engine_recipe(1, "fp32"))
    trainer.step(trainer.batches(0))
    engine, network = weakref.ref(trainer.engine._engine), trainer.network
    trainer.close()
    del trainer
    gc.collect()
    assert engine() is None, "DeepSpeed's engine lives on with the network"
    assert bool(F.softmax(network(random_images(2, 28, where)), 1).isfinite().all())
    return "a finished network does not keep its engine alive"


def _zero_stages(where: torch.device) -> str:
    """ZeRO has weights in flat tensors in the usual memory format; at stage 0 they have their channels last."""
    gpu = where.type == "cuda"
    sections = {
        "model": {"arch": "resnet50" if gpu else "resnet18", "num_classes": 10},
        "data": {"image_size": 224 if gpu else 32, "augmentation": "none"},
    }
    micro, rounds = (64, 5) if gpu else (4, 1)
    ratios = []
    for name, prunes in (("pretrain", False), ("prune", True)):
        recipes = {f"ZeRO {zero}": engine_recipe(zero, "bf16", 2, micro, **sections) for zero in (0, 1)}
        trainers = {label: Trainer(where, recipe, None, prunes) for label, recipe in recipes.items()}
        steps = {label: partial(trainer.step, trainer.batches(0)) for label, trainer in trainers.items()}
        seconds = alternate(steps, rounds, where)
        ratios.append(f"{ratio(name, seconds, 'ZeRO 1', 'ZeRO 0').median:.2f} times in {name}")
        for trainer in trainers.values():
            trainer.close()
    return f"stage 1 takes {' and '.join(ratios)} as long as stage 0, with nothing to share"


ENGINE_CHECKS: list[Check] = [
    ("engine, and resume", ("deepspeed",), _resume),
    ("NaN gradient", ("deepspeed",), _nan),
    ("waiting for the device", ("deepspeed",), _waits),
    ("closed engine", ("deepspeed",), _closed),
    ("memory", ("cuda", "deepspeed"), _memory),
    ("ZeRO's stages", ("deepspeed",), _zero_stages),
]
