"""A worker that computes wrongly or is unlike its peers is named before it trains."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.group import Group
from pipeline.health import Unhealthy, check_device, check_worker
from pipeline.job import Job
from tests.small_recipe import small_recipe

CPU = torch.device("cpu")
Answer = tuple[str, str | None, dict[str, Any]]


@dataclass(frozen=True)
class Peers(Group):
    """This worker and others, whose answers are made from its own."""

    others: tuple[Callable[[Answer], Answer], ...] = ()

    def gather(self, value: Any) -> list[Any]:
        return [value, *(other(value) for other in self.others)]


def job_among(data: Path, *others: Callable[[Answer], Answer]) -> Job:
    return Job(small_recipe(data), data, "token", Peers(0, 1 + len(others), CPU, others))


def like(answer: Answer) -> Answer:
    return answer


def unlike(host: str, **differences: Any) -> Callable[[Answer], Answer]:
    return lambda answer: (host, None, answer[2] | differences)


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


def test_equal_workers_may_begin(fashion_data: Path) -> None:
    check_worker(job_among(fashion_data, like, like))


@pytest.mark.parametrize("key", ["recipe", "data.train_file", "data.test_file", "torch", "python", "device", "threads"])
def test_the_odd_one_is_named_with_its_host(fashion_data: Path, key: str) -> None:
    job = job_among(fashion_data, like, unlike("node-7", **{key: "another"}))
    with pytest.raises(Unhealthy, match=f"the workers differ in {key}: most have .*, node-7 has another"):
        check_worker(job)


def test_what_another_worker_found_stops_all(fashion_data: Path) -> None:
    def broken(answer: Answer) -> Answer:
        return "node-3", "node-3: cuda:0 computes wrongly", answer[2]

    with pytest.raises(Unhealthy, match="node-3: cuda:0 computes wrongly"):
        check_worker(job_among(fashion_data, like, broken))
