"""How long training waits for a checkpoint: `python -m tests.bench.checkpoints [FOLDER]`.

The time between two steps (copying what a checkpoint holds) and the slowdown of steps while it is written in the
background, relative to the time of 1,000 steps. On a CPU images are small, so steps are far shorter than ImageNet's.
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
from tests.bench.alternate import Ratio, Seconds, device, parse_folder, write_results
from tests.bench.real_step import RealStep, alone, random_batch, recipe_of
from tests.bench.step import ARCH, MICRO_BATCH, PARTS, SIZE

ROUNDS, UNDISTURBED, EVERY = 5, 3, 1000
STEP, BESIDE, WAITING = "step", "step while a checkpoint is written", "snapshot and hand-over"


def _time_call(function: Callable[[], object], where: torch.device) -> float:
    """Seconds of wall clock, as the writer has its own thread."""
    start = time.perf_counter()
    function()
    if where.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    folder = parse_folder(__doc__)
    where = device()
    make_deterministic(1)
    count, size = MICRO_BATCH[where.type], SIZE[where.type]
    recipe = recipe_of(ARCH, "pgd-3", count, PARTS, "fp32")
    step = RealStep(recipe, alone(where), random_batch(count, size), "scores")
    training = step.training
    step()

    seconds: Seconds = {STEP: [], BESIDE: [], WAITING: []}
    shares = []
    with tempfile.TemporaryDirectory() as run:
        writer = Writer(Path(run), 2, lambda number: None)
        for number in range(ROUNDS):
            undisturbed = statistics.median(_time_call(step, where) for _ in range(UNDISTURBED))
            progress = replace(step.progress, step=number + 1)

            def hand_over(progress=progress) -> None:
                writer.submit(snapshot(training, progress))

            waiting, beside = _time_call(hand_over, where), []
            while any(thread.name == "checkpoint-writer" for thread in threading.enumerate()):
                beside.append(_time_call(step, where))
            writer.wait()
            seconds[STEP].append(undisturbed)
            seconds[WAITING].append(waiting)
            seconds[BESIDE] += beside
            slowdown = sum(max(duration - undisturbed, 0.0) for duration in beside)
            shares.append((waiting + slowdown) / (EVERY * undisturbed))
        bytes_ = sum(path.stat().st_size for path in Path(run).glob("step-*/*")) // 2
    name = f"waiting for a checkpoint / {EVERY} prune steps"
    ratios = [Ratio(name, statistics.median(shares), min(shares), max(shares), "<= 0.01")]
    setting = (
        f"{ARCH}, {size} px, PGD-3, {PARTS} micro-batches of {count}, fp32, eager; "
        f"a checkpoint has {bytes_ / 2**20:.0f} MiB"
    )
    write_results("checkpoints", folder, setting, seconds, ratios, where)


if __name__ == "__main__":
    main()
