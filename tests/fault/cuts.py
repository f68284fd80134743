"""Kills a run at an exact place: an observer inside the workers, told by a file in the run directory what to do.

`cut.json`: {"event": ..., "stage": ..., "step": ..., "victim": "worker" | "run"}. It fires once, on the rank that
finds it first to match; "run" means the driver, whose cluster dies with it.
"""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import ray.train

from pipeline.lease import read_holder


def _run_folder() -> Path:
    return Path(os.environ["HYDRA_TEST_RUN"])


def set_cut(folder: Path, event: str, stage: str, step: int | None, victim: str) -> None:
    (folder / "cut.json").write_text(json.dumps({"event": event, "stage": stage, "step": step, "victim": victim}))


def cut(event: str, facts: dict[str, Any]) -> None:
    """The observer: kills at the place that cut.json names, on the highest rank (a worker) or rank 0 (the run)."""
    folder = _run_folder()
    try:
        wanted = json.loads((folder / "cut.json").read_text())
    except FileNotFoundError:
        return
    if (event, facts["stage"]) != (wanted["event"], wanted["stage"]):
        return
    if wanted["step"] is not None and facts.get("step") != wanted["step"]:
        return
    context = ray.train.get_context() if event != "before_manifest" else None
    rank = context.get_world_rank() if context else 0  # checkpoints are written by rank 0, in a thread of its own
    if wanted["victim"] == "worker":
        if context is not None and rank != context.get_world_size() - 1:
            return
    elif rank != 0:
        return
    (folder / "cut.json").rename(folder / f"cut-done-{len(list(folder.glob('cut-done-*')))}.json")
    if wanted["victim"] == "run":
        holder = read_holder(folder / facts["stage"])
        assert holder is not None
        os.kill(holder.pid, signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)
