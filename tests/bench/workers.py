"""Throughput over workers on this machine: `python -m tests.bench.workers [FOLDER]`.

The training loop's own adversarial step in process groups of one worker with two threads, two with one, and four with
one, in turn, each in new processes. The batch is the same: four micro-batches, split among the workers. Wall clock, so
the machine must be idle. Also reports the peak memory of a worker.
"""

from __future__ import annotations

import resource
import statistics
import time

import torch

from pipeline.distributed import Group
from tests.bench.alternate import Seconds, parse_folder, ratio, write_results
from tests.bench.real_step import RealStep, random_batch, recipe_of
from tests.support.processes import run_group

ARCH, SIZE, MICRO_BATCH, PARTS, PRECISION = "resnet50", 96, 16, 4, "fp32"
WARM_UP, STEPS, ROUNDS = 1, 4, 5
GROUPS = {"1 worker, 2 threads": (1, 2), "2 workers, 1 thread each": (2, 1), "4 workers, 1 thread each": (4, 1)}


def measure_step(group: Group) -> tuple[float, int]:
    """Median time of a step in seconds, and this process's peak resident memory in bytes."""
    batch = random_batch(MICRO_BATCH, SIZE)
    step = RealStep(recipe_of(ARCH, "fgsm", MICRO_BATCH, PARTS, PRECISION), group, batch, "weights")
    seconds = []
    for _ in range(WARM_UP + STEPS):
        torch.distributed.barrier()
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[WARM_UP:]), 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main() -> None:
    folder = parse_folder(__doc__)
    seconds: Seconds = {label: [] for label in GROUPS}
    largest: dict[str, int] = {}
    for number in range(ROUNDS):
        for label, (world, threads) in list(GROUPS.items())[:: 1 if number % 2 else -1]:
            results = run_group(world, measure_step, threads=threads)
            seconds[label].append(max(step for step, _ in results))
            largest[label] = max(most for _, most in results)
    one, two, four = GROUPS
    ratios = [
        ratio("images/s of 2 workers / 1 worker with 2 threads", seconds, one, two, ">= 0.9"),
        ratio("images/s of 4 workers / 1 worker with 2 threads", seconds, one, four),
    ]
    memory = ", ".join(f"{label}: {most / 2**20:.0f} MiB" for label, most in largest.items())
    setting = (
        f"{ARCH}, {SIZE} px, one-step adversarial, {PARTS} micro-batches of {MICRO_BATCH} in all, {PRECISION}, ZeRO 1 "
        f"from two workers on, {ROUNDS} rounds of {STEPS} steps, wall clock; largest memory of a worker: {memory}"
    )
    write_results("workers", folder, setting, seconds, ratios, torch.device("cpu"))


if __name__ == "__main__":
    main()
