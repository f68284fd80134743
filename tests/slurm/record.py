"""An observer that records the inputs of a worker per step, and slows training down until a file ends that."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch

from tests.slurm.throttle import FOLDER, slow


def _hash(image: torch.Tensor) -> str:
    return hashlib.sha256(image.detach().cpu().numpy().tobytes()).hexdigest()[:16]


def fed(event: str, facts: dict[str, Any]) -> None:
    """Called on every worker at every event: one line per micro-batch."""
    if event == "forward":
        line = {
            "stage": facts["stage"],
            "step": facts["step"],
            "world": torch.distributed.get_world_size(),
            "images": {str(i): _hash(image) for i, image in zip(facts["ids"].tolist(), facts["fed"], strict=True)},
        }
        with (Path(os.environ[FOLDER]) / f"fed-{os.getpid()}.jsonl").open("a") as stream:
            stream.write(json.dumps(line) + "\n")
    slow(event, facts)
