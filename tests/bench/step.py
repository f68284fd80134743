"""The cost of a training step, as ratios: `python -m tests.bench.step [FOLDER]`; writes JSON and a table.

The training loop's own steps, through DeepSpeed in a process group of one, compared with a plain PyTorch loop
(`baseline`) and each other; compiled if the fastest baseline is. On a CPU smaller images, one thread and CPU time; on a
GPU ImageNet's sizes and wall clock.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from unittest import mock

import torch

from pipeline.data.loading.loader import Batch
from pipeline.distributed import make_deterministic
from pipeline.models.pruning.masked_weight import Masked
from pipeline.models.pruning.scores import Scores
from pipeline.models.pruning.topk import kept_count
from tests.bench.alternate import alternate, device, parse_folder, ratio, write_results
from tests.bench.baseline import candidates
from tests.bench.real_step import KEEP, RealStep, Trains, alone, random_batch, recipe_of

ARCH, PARTS = "resnet50", 2
MICRO_BATCH = {"cpu": 16, "cuda": 64}
SIZE = {"cpu": 96, "cuda": 224}
ROUNDS = {"cpu": 7, "cuda": 30}
FEW_ROUNDS = 2
"""Rounds for choosing the fastest baseline, and for the step that sorts."""
CLEAN, FGSM, PGD, TRADES = "clean", "fgsm", "pgd-3", "trades-3"
PRUNE, FINETUNE, SORTING = "prune, pgd-3", "finetune, pgd-3", "prune, pgd-3, sorting at every forward"
K = 3
"""Attack steps of PGD and TRADES."""


@contextmanager
def _sorting_at_every_forward() -> Iterator[None]:
    """Masks as in HYDRA's reference code: every forward pass, also of the attack, sorts the scores of every layer."""
    original = Masked.forward

    def forward(self: Masked, weight: torch.Tensor) -> torch.Tensor:
        order = self.score.detach().abs().flatten().argsort()
        flat = torch.ones_like(order, dtype=torch.bool)
        flat[order[: len(order) - kept_count(len(order), KEEP)]] = False
        self.mask = flat.view(self.mask.shape)
        return original(self, weight)

    with (
        mock.patch.object(Masked, "forward", forward),
        mock.patch("pipeline.robustness.attacks.cached_weights", return_value=nullcontext()),
        mock.patch.object(Scores, "refresh"),
    ):
        yield


def _with_sorting(step: Callable[[], None]) -> Callable[[], None]:
    def sorting_step() -> None:
        with _sorting_at_every_forward():
            step()

    return sorting_step


def main() -> None:
    folder = parse_folder(__doc__)
    where = device()
    kind = where.type
    make_deterministic(1)
    count, size, rounds = MICRO_BATCH[kind], SIZE[kind], ROUNDS[kind]
    group = alone(where)
    whole = random_batch(count * PARTS, size)
    batch = Batch(whole.images[:count], whole.labels[:count], whole.ids[:count])

    plain = candidates(ARCH, whole.images.to(where), whole.labels.to(where), PARTS)
    plain_seconds = alternate(plain, FEW_ROUNDS, where)
    fastest = min(plain_seconds, key=lambda label: statistics.median(plain_seconds[label]))
    precision, mode = "bf16" if "bf16" in fastest else "fp32", "compiled" if "compile" in fastest else "eager"

    def ours(objective: str, trains: Trains = "weights", mode: str = mode) -> Callable[[], None]:
        return RealStep(recipe_of(ARCH, objective, count, PARTS, precision, mode=mode), group, batch, trains)

    steps = {
        fastest: plain[fastest],
        CLEAN: ours("clean"),
        FGSM: ours("fgsm"),
        PGD: ours("pgd-3"),
        TRADES: ours("trades-3"),
        PRUNE: ours("pgd-3", "scores"),
        FINETUNE: ours("pgd-3", "kept weights"),
    }
    seconds = alternate(steps, rounds, where)
    # Both eager: a compiled forward pass would get weights that were masked before it.
    sorting = {
        SORTING: _with_sorting(ours("pgd-3", "scores", "eager")),
        f"{PRUNE}, eager": ours("pgd-3", "scores", "eager"),
    }
    sorting_seconds = alternate(sorting, FEW_ROUNDS, where)
    ratios = [
        ratio("baseline / clean step", seconds, fastest, CLEAN, ">= 0.98"),
        ratio("one-step adversarial / clean step", seconds, FGSM, CLEAN, "<= 1.85"),
        ratio(f"PGD-{K} / clean step", seconds, PGD, CLEAN, f"<= {0.75 * K + 1.1:.2f}"),
        ratio("prune / dense step, both PGD-3", seconds, PRUNE, PGD, "<= 1.05"),
        ratio("finetune / dense step, both PGD-3", seconds, FINETUNE, PGD),
        ratio("TRADES-3 / PGD-3", seconds, TRADES, PGD),
        ratio("prune step that sorts at every forward / ours", sorting_seconds, *sorting),
    ]
    setting = f"{ARCH}, {size} px, {PARTS} micro-batches of {count}, {precision}, {mode}, {rounds} rounds"
    write_results("step", folder, setting, {**plain_seconds, **seconds, **sorting_seconds}, ratios, where)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
