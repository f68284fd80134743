"""Rank 0 has the numbers of every node, each of them from that node."""

from __future__ import annotations

import platform
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from pipeline.distributed import Group
from pipeline.training import hardware
from pipeline.training.hardware import NodeUsage

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


class Cluster(Group):
    """Two nodes with four workers, of which this process is the first: what the others would have sent is given."""

    def gather(self, value: Any) -> list[Any]:
        return [value, "other", value, "other"]

    def gather_rows(self, rows: torch.Tensor) -> torch.Tensor:
        others = torch.tensor([[90.0, 10, 50, 20], [20, 40, 60, 0], [70, 30, float("nan"), 80]], dtype=rows.dtype)
        return torch.cat([rows, others])


@pytest.fixture
def usage(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host whose processors were 10 % busy, with 40 % of its memory in use."""
    monkeypatch.setattr(psutil, "cpu_percent", lambda: 10.0)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(percent=40.0))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """One with 60 of 80 GB in use, and no other metric."""

    def utilization(device: torch.device) -> int:
        raise ModuleNotFoundError("nvidia-ml-py does not seem to be installed or it can't be imported.")

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (20, 80))
    monkeypatch.setattr(torch.cuda, "utilization", utilization)


@pytest.mark.usefixtures("usage")
def test_each_node_is_the_mean_of_its_workers() -> None:
    usage = NodeUsage(Cluster(0, 4, CPU)).sample()
    first = {"processor_percent": 15, "memory_percent": 40, "gpu_percent": 60, "gpu_memory_percent": 0}
    other = {"processor_percent": 80, "memory_percent": 20, "gpu_percent": 50, "gpu_memory_percent": 50}
    assert usage == {"node-0": first, "node-1": other}


@pytest.mark.usefixtures("usage")
def test_what_a_node_has_not_is_left_out() -> None:
    """Rows are JSON, which has no NaN; and hosts are not named."""
    usage = NodeUsage(Group(0, 1, CPU)).sample()
    assert usage == {"node-0": {"processor_percent": 10, "memory_percent": 40}}
    assert platform.node() not in str(usage)


@pytest.mark.usefixtures("usage", "gpu")
def test_a_gpu_whose_driver_cannot_be_asked_has_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    assert hardware._sample(GPU)[3] == 75
    assert hardware._sample(GPU)[2] != hardware._sample(GPU)[2]
    monkeypatch.setattr(torch.cuda, "utilization", lambda device: 98)
    assert hardware._sample(GPU) == [10, 40, 98, 75]


def test_a_real_host_has_percentages() -> None:
    (usage,) = NodeUsage(Group(0, 1, CPU)).sample().values()
    assert all(0 <= value <= 100 for value in usage.values())
    assert usage["memory_percent"] > 0
