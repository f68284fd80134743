"""Spoils a worker's images at an exact place, as broken memory would, so that the loss of a step is not a number.

`poison.json`: [[stage, step, times], ...]; a place is spoiled as often as it says.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

Dose = tuple[str, int, int]
"""(stage, step, times)"""


def set_doses(folder: Path, doses: Sequence[Dose]) -> None:
    (folder / "poison.json").write_text(json.dumps(doses))


def poisoned_samples(folder: Path, stage: str) -> list[list[int]]:
    """Sample ids of the spoiled micro-batches of a stage, oldest first."""
    marks = sorted(folder.glob(f"poisoned-{stage.replace('/', '-')}-*"))
    return [json.loads(mark.read_text()) for mark in marks]


def spoil(event: str, facts: dict[str, Any]) -> None:
    """The observer: on the highest rank, in its first micro-batch."""
    folder = Path(os.environ["HYDRA_TEST_RUN"])
    if event != "forward" or facts["micro_batch"] or torch.distributed.get_rank() == 0:
        return
    stage = facts["stage"]
    for where, step, times in json.loads((folder / "poison.json").read_text()):
        number = len(poisoned_samples(folder, stage))
        if (stage, facts["step"]) == (where, step) and number < times:
            (folder / f"poisoned-{stage.replace('/', '-')}-{number}").write_text(json.dumps(facts["ids"].tolist()))
            facts["fed"].fill_(float("nan"))
