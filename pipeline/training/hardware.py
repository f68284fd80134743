"""Hardware of a run's workers, for comparing runs: models, counts and usage, without host names."""

from __future__ import annotations

import os
import platform
from contextlib import suppress
from typing import Any

import psutil
import torch

from pipeline.distributed import Group
from pipeline.run.provenance import processor_model


def hardware_of(group: Group, threads: int) -> dict[str, Any]:
    """Counts of nodes and workers, and models of processors and GPUs; commas join different models. Collective.

    `threads`: per worker.
    """
    gpu = torch.cuda.get_device_name(group.device) if group.device.type == "cuda" else None
    answers = group.gather((platform.node(), processor_model(), os.cpu_count(), gpu))
    gpus = [model for _, _, _, model in answers if model is not None]
    return {
        "nodes": len({host for host, _, _, _ in answers}),
        "workers": group.world,
        "threads_per_worker": threads,
        "processor": _models([processor for _, processor, _, _ in answers]),
        "processors_per_node": max(count or 0 for _, _, count, _ in answers),
        "gpu": _models(gpus),
        "gpus": len(gpus),
    }


def _models(names: list[str]) -> str | None:
    return ", ".join(sorted(set(names))) or None


def interface_of(address: str) -> str:
    """Name of this machine's network interface with an IP address. Errors: ValueError if there is none."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(one.address.partition("%")[0] == address for one in addresses):
            return name
    raise ValueError(f"no network interface of {platform.node()} has the address {address}, by which Ray knows it")


METRICS = ("processor_percent", "memory_percent", "gpu_percent", "gpu_memory_percent")
"""Of a node: processor use since the previous row, memory use now. Of its workers' GPUs: share of the last second or
less in which a kernel ran, and memory in use now by any process; both from the driver."""


class NodeUsage:
    """Usage of a group's nodes, numbered in the order of their lowest ranks, without host names."""

    def __init__(self, group: Group) -> None:
        """Collective."""
        hosts = group.gather(platform.node())
        names = list(dict.fromkeys(hosts))
        self._group = group
        self._node_of = [names.index(host) for host in hosts]
        psutil.cpu_percent()  # the next call measures from here

    def sample(self) -> dict[str, dict[str, float]]:
        """{"node-0": {metric: percent, the mean over its workers}, ...}, without metrics that a node lacks.

        Collective, four numbers per worker: for each metrics row, not for each step.
        """
        own = torch.tensor([_sample(self._group.device)], dtype=torch.float64, device=self._group.device)
        rows = self._group.gather_rows(own).cpu()
        usage = {}
        for node in range(max(self._node_of) + 1):
            means = rows[[n == node for n in self._node_of]].nanmean(dim=0).tolist()
            usage[f"node-{node}"] = {name: mean for name, mean in zip(METRICS, means, strict=True) if mean == mean}
        return usage


def _sample(device: torch.device) -> list[float]:
    """METRICS as measured by this worker; NaN for missing ones."""
    gpu = memory = float("nan")
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        memory = 100.0 * (1.0 - free / total)
        with suppress(Exception):  # optional: nvidia-ml-py or the driver may not support it
            gpu = float(torch.cuda.utilization(device))
    return [psutil.cpu_percent(), psutil.virtual_memory().percent, gpu, memory]
