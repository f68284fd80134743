"""A worker that computes wrongly or is unlike its peers is named before it trains."""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.data.manifest import DataError
from pipeline.distributed import Group
from pipeline.training.context import RunContext
from pipeline.training.health import Unhealthy, check_bounds, check_device, check_worker
from tests.support.small_recipe import small_recipe

CPU = torch.device("cpu")
Answer = tuple[str, str | None, str | None, dict[str, Any]]
"""(host, what is wrong with it, what is wrong with its data, what must be equal)."""


@dataclass(frozen=True)
class Peers(Group):
    """This worker and others, whose answers are made from its own."""

    others: tuple[Callable[[Answer], Answer], ...] = ()

    def gather(self, value: Any) -> list[Any]:
        return [value, *(other(value) for other in self.others)]


def context_among(data: Path, *others: Callable[[Answer], Answer]) -> RunContext:
    return RunContext(small_recipe(data), data, "token", Peers(0, 1 + len(others), CPU, others))


def like(answer: Answer) -> Answer:
    return answer


def unlike(host: str, **differences: Any) -> Callable[[Answer], Answer]:
    return lambda answer: (host, None, None, answer[3] | differences)


def test_a_device_that_computes_passes() -> None:
    check_device(CPU)


def test_a_device_that_computes_wrongly_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    right = torch.Tensor.__matmul__

    def wrong(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        product = right(one, other)
        if product.is_floating_point():
            product[3, 5] += 1
        return product

    monkeypatch.setattr(torch.Tensor, "__matmul__", wrong)
    with pytest.raises(Unhealthy, match=r"cpu computes wrongly \(1 of 65536 sums\); exclude this node"):
        check_device(CPU)


def test_a_device_that_is_not_there_is_named() -> None:
    with pytest.raises(Unhealthy, match="meta does not compute"):
        check_device(torch.device("meta"))


def test_a_device_without_room_is_not_a_broken_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its node need not be excluded: something else uses it."""

    def full(*_: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB")

    monkeypatch.setattr(torch.Tensor, "__matmul__", full)
    with pytest.raises(torch.OutOfMemoryError):
        check_device(CPU)


def test_equal_workers_may_begin(fashion_data: Path) -> None:
    check_worker(context_among(fashion_data, like, like))


@pytest.mark.parametrize("key", ["recipe", "data.train_file", "data.test_file", "torch", "python", "device", "threads"])
def test_the_odd_one_is_named_with_its_host(fashion_data: Path, key: str) -> None:
    context = context_among(fashion_data, like, unlike("node-7", **{key: "another"}))
    with pytest.raises(Unhealthy, match=f"the workers differ in {key}: most have .*, node-7 has another"):
        check_worker(context)


def test_what_another_worker_found_stops_all(fashion_data: Path) -> None:
    def broken(answer: Answer) -> Answer:
        return "node-3", "node-3: cuda:0 computes wrongly", None, answer[3]

    with pytest.raises(Unhealthy, match="node-3: cuda:0 computes wrongly"):
        check_worker(context_among(fashion_data, like, broken))


def test_data_that_one_node_lacks_is_the_users_to_mend_and_its_host_named(fashion_data: Path, tmp_path: Path) -> None:
    def without(answer: Answer) -> Answer:
        return "node-3", None, "node-3: train.beton: no such file", {}

    with pytest.raises(DataError, match=r"^node-3: train.beton: no such file$"):
        check_worker(context_among(fashion_data, like, without))
    here = RunContext(small_recipe(tmp_path), tmp_path, "token", Peers(0, 2, CPU, (like,)))
    with pytest.raises(DataError, match=rf"^{platform.node()}: .*train.beton"):
        check_worker(here)


def test_a_network_without_bounds_is_refused_before_it_is_trained_for_nothing(fashion_data: Path) -> None:
    """In a search the objective that needs bounds begins when pretraining on clean images is over."""
    phase = {"epochs": 1, "lr": 0.1}
    phases = {"pretrain": {**phase, "objective": {"name": "clean"}}, "prune": phase, "finetune": None}
    search: dict[str, Any] = {"phases": phases, "sparsity": {"baselines": []}, "objective": {"name": "crown_ibp"}}
    without = {"arch": "squeezenet1_1", "num_classes": 10}
    small = {"image_size": 32, "augmentation": "none"}
    words = r"^objective.name crown_ibp needs bounds of model.arch squeezenet1_1: .*MaxPool2d.*; choose another network"
    context = RunContext(
        small_recipe(fashion_data, **search, model=without, data=small), fashion_data, "token", Peers(0, 1, CPU)
    )
    with pytest.raises(ValueError, match=words):
        check_worker(context)
    check_bounds(small_recipe(fashion_data, **search))
    check_bounds(small_recipe(fashion_data, model=without, data=small))
