"""What a training step costs, as ratios measured in one run: `python -m tests.bench.step`.

One process, one thread, ResNet-18 on 64 x 64 noise: forward and backward of the update alone (clean), with one attack
step (fgsm), with three (pgd); and with the masks of 99 % pruned made once per step, as the loop does, or before every
forward.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from decimal import Decimal

import torch

from pipeline.models import build_network
from pipeline.objectives import Given, build_objective
from pipeline.recipe_objective import Objective, ThreatModel
from pipeline.recipe_sections import Model
from pipeline.sparsity import attach_scores, refresh_masks, train_only

REPEATS = 5
THREAT = ThreatModel.model_validate({"norm": "linf", "eps": "4/255"})


def _seconds(step: Callable[[], None]) -> float:
    step()
    samples = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        step()
        samples.append(time.perf_counter() - started)
    return statistics.median(samples)


def main() -> None:
    torch.set_num_threads(1)
    images, labels = torch.rand(8, 3, 64, 64), torch.arange(8)
    keys = torch.arange(8)
    network = build_network(Model(arch="resnet18", num_classes=10), seed=0).train()
    attach_scores(network, Decimal("0.01"))
    train_only(network, "scores")

    def step_of(name: str, steps: int, masks_per_forward: bool) -> Callable[[], None]:
        values = {"name": name, "steps": steps, "step_size": "2/255"}
        objective = build_objective(Objective.model_validate(values), THREAT, "prune")

        def step() -> None:
            forwards = steps + 1 if masks_per_forward else 1
            for _ in range(forwards):
                refresh_masks(network)
            objective(Given(network, network, images, labels, keys)).loss.backward()

        return step

    clean = _seconds(step_of("clean", 1, masks_per_forward=False))
    print(f"{'step':<34} {'ms':>8} {'/ clean':>8}")
    for label, name, steps, per_forward in (
        ("clean", "clean", 1, False),
        ("fgsm, masks once per step", "fgsm", 1, False),
        ("pgd-3, masks once per step", "pgd", 3, False),
        ("pgd-3, masks at every forward", "pgd", 3, True),
    ):
        seconds = clean if label == "clean" else _seconds(step_of(name, steps, per_forward))
        print(f"{label:<34} {seconds * 1e3:>8.0f} {seconds / clean:>8.2f}")


if __name__ == "__main__":
    main()
