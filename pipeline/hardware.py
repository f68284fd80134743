"""What a run's workers are made of, for people who compare runs: models and counts, no names of hosts."""

from __future__ import annotations

import os
import platform
from typing import Any

import torch

from pipeline.group import Group
from pipeline.processor import processor_model


def hardware_of(group: Group, threads: int) -> dict[str, Any]:
    """Nodes, workers, and models of processors and GPUs; a model that not all have is told apart by commas. Collective.

    `threads`: those of one worker.
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
