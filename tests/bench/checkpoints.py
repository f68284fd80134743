"""How long training waits for a checkpoint: `python -m tests.bench.checkpoints [FOLDER]`.

What stands between two steps (copies of all that a checkpoint holds), and what steps take longer while it is written
beside them, against the time of 1,000 steps. On a CPU small images, whose steps are far shorter than those of ImageNet.
"""

from __future__ import annotations

import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from pipeline.distributed import make_deterministic
from pipeline.run.checkpoint import Writer
from pipeline.training.loop import snapshot
from tests.bench.alternate import Ratio, Seconds, device, folder_asked_for, write
from tests.bench.real_step import RealStep, alone, random_batch, recipe_of
from tests.bench.step import ARCH, MICRO_BATCH, PARTS, SIZE

ROUNDS, UNDISTURBED, EVERY = 5, 3, 1000
STEP, BESIDE, WAITING = "step", "step while a checkpoint is written", "snapshot and hand-over"


def _timed(function: Callable[[], object], where: torch.device) -> float:
    """Wall clock, as a writer has a thread of its own."""
    started = time.perf_counter()
    function()
    if where.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def main() -> None:
    folder = folder_asked_for(__doc__)
    where = device()
    make_deterministic(1)
    count, size = MICRO_BATCH[where.type], SIZE[where.type]
    recipe = recipe_of(ARCH, "pgd-3", count, PARTS, "fp32")
    step = RealStep(recipe, alone(where), random_batch(count, size), "scores")
    training = step.training
    step()

    seconds: Seconds = {STEP: [], BESIDE: [], WAITING: []}
    shares = []
    with tempfile.TemporaryDirectory() as kept:
        writer = Writer(Path(kept), 2, lambda number: None)
        for number in range(ROUNDS):
            alone_ = statistics.median(_timed(step, where) for _ in range(UNDISTURBED))
            progress = replace(step.progress, step=number + 1)

            def hand_over(progress=progress) -> None:
                writer.submit(snapshot(training, progress))

            waiting, beside = _timed(hand_over, where), []
            while any(thread.name == "checkpoint-writer" for thread in threading.enumerate()):
                beside.append(_timed(step, where))
            writer.wait()
            seconds[STEP].append(alone_)
            seconds[WAITING].append(waiting)
            seconds[BESIDE] += beside
            shares.append((waiting + sum(max(took - alone_, 0.0) for took in beside)) / (EVERY * alone_))
        bytes_ = sum(path.stat().st_size for path in Path(kept).glob("step-*/*")) // 2
    name = f"waiting for a checkpoint / {EVERY} prune steps"
    ratios = [Ratio(name, statistics.median(shares), min(shares), max(shares), "<= 0.01")]
    setting = (
        f"{ARCH}, {size} px, PGD-3, {PARTS} micro-batches of {count}, fp32, eager; "
        f"a checkpoint has {bytes_ / 2**20:.0f} MiB"
    )
    write("checkpoints", folder, setting, seconds, ratios, where)


if __name__ == "__main__":
    main()
