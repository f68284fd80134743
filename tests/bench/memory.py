"""Memory of each phase relative to the baseline, and its growth: `python -m tests.bench.memory [FOLDER]`.

Each is measured in its own process: the peak memory that steps, including network, optimizer and images, add to a
process that has only done its imports. Resident memory on a CPU, allocated memory on a GPU. Growth is measured over a
small network's prune steps.
"""

from __future__ import annotations

import multiprocessing
import resource
from collections.abc import Callable

import psutil
import torch

from pipeline.data.loading.loader import Batch
from pipeline.distributed import make_deterministic
from tests.bench.alternate import device, parse_folder, ratio, write_results
from tests.bench.baseline import plain_step
from tests.bench.real_step import RealStep, Trains, alone, random_batch, recipe_of
from tests.bench.step import ARCH, MICRO_BATCH, PARTS, SIZE

PRECISION = "fp32"
STEPS, ROUNDS, MANY = 3, 3, 1000
BASELINE = "baseline"
PHASES: dict[str, tuple[str, Trains]] = {
    "pretrain, clean": ("clean", "weights"),
    "pretrain, PGD-3": ("pgd-3", "weights"),
    "prune, PGD-3": ("pgd-3", "scores"),
    "finetune, PGD-3": ("pgd-3", "kept weights"),
}


def _used(where: torch.device) -> int:
    """Bytes in use now."""
    return torch.cuda.memory_allocated() if where.type == "cuda" else psutil.Process().memory_info().rss


def _peak(where: torch.device) -> int:
    """Peak of bytes in use so far."""
    if where.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _step(label: str, where: torch.device) -> Callable[[], None]:
    count, size = MICRO_BATCH[where.type], SIZE[where.type]
    whole = random_batch(count * PARTS, size)
    if label == BASELINE:
        return plain_step(ARCH, whole.images.to(where), whole.labels.to(where), PARTS, bf16=False, compiled=False)
    objective, trains = PHASES[label]
    batch = Batch(whole.images[:count], whole.labels[:count], whole.ids[:count])
    return RealStep(recipe_of(ARCH, objective, count, PARTS, PRECISION), alone(where), batch, trains)


def peak(label: str) -> float:
    """Bytes that some steps add to this process at their peak."""
    where = device()
    make_deterministic(1)
    before = _used(where)
    step = _step(label, where)
    for _ in range(STEPS):
        step()
    return float(_peak(where) - before)


def growth() -> tuple[float, float]:
    """Bytes used after a tenth of many prune steps, and after all."""
    where = device()
    make_deterministic(1)
    recipe = recipe_of("small_cnn", "pgd-3", 16, 1, PRECISION)
    step = RealStep(recipe, alone(where), random_batch(16, 28), "scores")
    used = []
    for number in range(1, MANY + 1):
        step()
        if number in (MANY // 10, MANY):
            used.append(float(_used(where)))
    return used[0], used[1]


def main() -> None:
    folder = parse_folder(__doc__)
    where = device()
    context = multiprocessing.get_context("spawn")
    with context.Pool(1, maxtasksperchild=1) as fresh:
        bytes_of = {label: [fresh.apply(peak, (label,)) for _ in range(ROUNDS)] for label in (BASELINE, *PHASES)}
        ends = [fresh.apply(growth) for _ in range(ROUNDS)]
    tenth, all_ = f"small network, {MANY // 10} steps", f"small network, {MANY} steps"
    bytes_of |= {tenth: [early for early, _ in ends], all_: [late for _, late in ends]}
    ratios = [ratio(f"{label} / {BASELINE}", bytes_of, label, BASELINE) for label in PHASES]
    ratios.append(ratio(f"{MANY} / {MANY // 10} prune steps of a small network", bytes_of, all_, tenth, "<= 1.01"))
    kind = "allocated" if where.type == "cuda" else "resident"
    setting = (
        f"peak {kind} memory added by {STEPS} steps; {ARCH}, {SIZE[where.type]} px, {PARTS} micro-batches of "
        f"{MICRO_BATCH[where.type]}, {PRECISION}, eager; {ROUNDS} processes each"
    )
    write_results("memory", folder, setting, bytes_of, ratios, where, unit="MiB")


if __name__ == "__main__":
    main()
