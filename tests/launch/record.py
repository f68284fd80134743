"""An observer that writes down which images a worker is fed, at which step, and trains slowly until told otherwise."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch

from tests.launch.throttle import FOLDER, slow


def ids(event: str, facts: dict[str, Any]) -> None:
    """Called on every worker at every event: one line per micro-batch."""
    if event == "forward":
        line = {
            "stage": facts["stage"],
            "step": facts["step"],
            "world": torch.distributed.get_world_size(),
            "ids": facts["ids"].tolist(),
        }
        with (Path(os.environ[FOLDER]) / f"fed-{os.getpid()}.jsonl").open("a") as stream:
            stream.write(json.dumps(line) + "\n")
    slow(event, facts)
