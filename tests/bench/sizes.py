"""The cost of a step on smaller images, compared with their area: `python -m tests.bench.sizes [FOLDER]`.

The training loop's own step of ResNet-50 with a one-step attack, at the sizes of `recipes/imagenet_resnet50_fast.yaml`.
"""

from __future__ import annotations

import torch

from pipeline.distributed import make_deterministic
from tests.bench.alternate import alternate, device, parse_folder, ratio, write_results
from tests.bench.real_step import RealStep, alone, random_batch, recipe_of

SIZES = (128, 160, 192, 224)
MICRO_BATCH = {"cpu": 16, "cuda": 128}
ROUNDS = {"cpu": 4, "cuda": 20}


def main() -> None:
    folder = parse_folder(__doc__)
    where = device()
    make_deterministic(1)
    count, rounds, precision = MICRO_BATCH[where.type], ROUNDS[where.type], "fp32" if where.type == "cpu" else "bf16"
    group, recipe = alone(where), recipe_of("resnet50", "fgsm", count, 1, precision)
    labels = {size: f"step at {size} px" for size in SIZES}
    steps = {label: RealStep(recipe, group, random_batch(count, size), "weights") for size, label in labels.items()}
    seconds = alternate(steps, rounds, where)
    full = labels[SIZES[-1]]
    ratios = [
        ratio(f"{label} / {full}; of their areas: {size**2 / SIZES[-1] ** 2:.3f}", seconds, label, full)
        for size, label in labels.items()
        if label != full
    ]
    setting = f"resnet50, one attack step, one micro-batch of {count}, {precision}, eager, {rounds} rounds"
    write_results("sizes", folder, setting, seconds, ratios, where)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
