"""Interrupts a run at an exact place: an observer inside the workers, configured by a file in the run directory.

`cut.json`: [[event, stage, step or null, victim], ...]. Each fires once, after the one before it. Victims that are
killed: "worker"; "run", the driver and a worker; "command", which waits for the driver; "raylet" and "gcs_server", in
whose absence the worker goes no further, until it is ended as well. For "exception", one is raised in a worker.
"""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import torch

from pipeline.run.lease import read_holder

Cut = tuple[str, str, int | None, str]
"""(event, stage, step, victim)"""


class Mishap(RuntimeError):
    """What "exception" raises; it says nothing of its place."""


def _run_folder() -> Path:
    return Path(os.environ["HYDRA_TEST_RUN"])


def set_cuts(folder: Path, cuts: Sequence[Cut]) -> None:
    """Cuts are made in this order."""
    (folder / "cut.json").write_text(json.dumps(cuts))


def done_cuts(folder: Path) -> int:
    return len(list(folder.glob("cut-done-*")))


def cut(event: str, facts: dict[str, Any]) -> None:
    """The observer: acts at the place that cut.json names, on the highest rank, or on rank 0 for the whole run."""
    folder = _run_folder()
    try:
        when, stage, step, victim = json.loads((folder / "cut.json").read_text())[done_cuts(folder)]
    except (FileNotFoundError, IndexError):
        return
    if (event, facts["stage"]) != (when, stage) or (step is not None and facts.get("step") != step):
        return
    # Checkpoints are written by rank 0, in a thread of its own.
    if torch.distributed.get_rank() != (0 if victim in ("run", "command") else torch.distributed.get_world_size() - 1):
        return
    (folder / f"cut-done-{done_cuts(folder)}").touch()
    if victim == "exception":
        raise Mishap("as the test asked for")
    if victim != "worker":
        holder = read_holder(folder / facts["stage"])
        assert holder is not None
        driver = psutil.Process(holder.pid)
        if victim == "run":
            driver.kill()
        elif victim == "command":
            os.kill(driver.ppid(), signal.SIGKILL)
        else:
            next(process for process in driver.children() if process.name() == victim).kill()
            threading.Event().wait()
    os.kill(os.getpid(), signal.SIGKILL)
