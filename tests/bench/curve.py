"""Models the cost of a whole curve in GPU-hours: `python -m tests.bench.curve RECIPE --images-per-s R`.

The unit is the training pass, a forward and backward pass of one image of data.image_size; a GPU makes R of them per
second. In this unit the costs are

    an attack's pass, which has no gradients of weights    ATTACK_PASS
    a forward pass                                         FORWARD
    any pass of an image of another size                   its area over that of data.image_size
    any pass of an evaluation, which is in fp32            FP32 times as much, under bf16

and a curve consists of every stage's epochs over the training images, the held-out images after each epoch, and PGD and
AutoAttack on every exported network. Not included: communication (see `tests.bench.scaling`), waiting for data,
checkpoints, honesty checks, starts.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.recipe.file import load_recipe
from pipeline.recipe.schedules import image_size_at
from pipeline.recipe.schema import Recipe
from pipeline.recipe.stages import Stage, stages_of
from pipeline.report.history import passes_per_step
from tests.bench.scaling import ATTACK_PASS

FORWARD = 1 / 3
FP32 = 3.0
"""At R = 1719 ResNet-50's 4.09 billion multiply-adds, three times over, are 42 TFLOP/s, of an A100's 19.5 in fp32
(NVIDIA's data sheet): 2.2 times longer at the peak; 3 is a guess of the ratio in practice."""
TRAIN_IMAGES, TEST_IMAGES = 1_281_167, 50_000
"""Of ImageNet."""
RIGHT, ROBUST = 0.64, 0.35
"""Shares of the images that AutoAttack's first attack and its later ones run on: those of a good dense network
(RobustBench, Salman2020Do_R50). On pruned networks fewer images remain, so they cost less."""
FIRST_ATTACK, OTHER_ATTACKS = (111, 101), ((928, 909), (1837, 900), (5012, 0))
"""AutoAttack's APGD-CE; APGD-T, FAB-T and Square: (forward passes, how many of them have a gradient) per image that is
robust to all, counted by a network that counts its calls."""
SECONDS_PER_HOUR = 3600


@dataclass(frozen=True)
class Cost:
    """One line of the table."""

    part: str
    epochs: int
    area: float | None
    """Mean area of the training images over that of data.image_size."""
    passes: float
    """Number of training passes."""


def attack_passes(forwards: int, gradients: int) -> float:
    """Cost of `forwards` forward passes, `gradients` of which have a backward pass to the image, in training passes."""
    return gradients * ATTACK_PASS + (forwards - gradients) * FORWARD


def mean_area(stage: Stage, image_size: int) -> float:
    """Mean area of a stage's training images, relative to that of `image_size`."""
    optimisation = stage.optimisation
    sizes = [image_size_at(optimisation, image_size, epoch) for epoch in range(optimisation.epochs)]
    return sum(size**2 for size in sizes) / len(sizes) / image_size**2


def pgd_passes(steps: int, restarts: int) -> float:
    """Cost of one image that is evaluated clean and after every restart, in training passes."""
    return FORWARD + restarts * attack_passes(steps + 1, steps)


def autoattack_passes() -> float:
    """Mean cost of an image for a network of robust accuracy `ROBUST`, in training passes."""
    others = sum(attack_passes(*counts) for counts in OTHER_ATTACKS)
    return FORWARD + RIGHT * attack_passes(*FIRST_ATTACK) + ROBUST * others


def training_cost(stage: Stage, recipe: Recipe) -> Cost:
    """Cost of one stage. Errors: ValueError for objectives that propagate bounds."""
    passes = passes_per_step(stage.objective)
    if passes is None:
        raise ValueError(f"objective.name={stage.objective.name} propagates bounds; the model counts passes")
    area, epochs = mean_area(stage, recipe.data.image_size), stage.epochs
    each = (1 + (passes - 1) * ATTACK_PASS + stage.extra_passes) * stage.objective.steps_per_batch
    images = (recipe.data.train_images or TRAIN_IMAGES - recipe.data.validation_images) * epochs
    return Cost(stage.phase, epochs, area, images * each * area)


def costs(recipe: Recipe) -> list[Cost]:
    """The parts of the curve. Errors: ValueError for a recipe whose networks are not evaluated by PGD."""
    if recipe.objective.measure != "pgd":
        raise ValueError(f"objective.name={recipe.objective.name} is not evaluated by PGD; the model supports only PGD")
    stages, evaluation = stages_of(recipe), recipe.evaluation
    stage_costs = [training_cost(stage, recipe) for stage in stages if stage.trained_by is not None]
    parts = []
    for name in dict.fromkeys(cost.part for cost in stage_costs):
        same = [cost for cost in stage_costs if cost.part == name]
        label = name if len(same) == 1 else f"{name}, {len(same)} sparsities"
        parts.append(Cost(label, sum(cost.epochs for cost in same), same[0].area, sum(cost.passes for cost in same)))

    slower = FP32 if recipe.engine.precision == "bf16" else 1.0
    validation = 0.0
    for stage in stages:
        each = pgd_passes(evaluation.validation_steps, 1) if evaluation.validation_steps else 0.0
        each += attack_passes(2, 1) if stage.objective.guarded else 0.0
        validation += stage.epochs * each * recipe.data.validation_images
    parts.append(Cost("held-out images", 0, None, slower * validation))
    networks = sum(stage.measure is not None for stage in stages)
    pgd = networks * (evaluation.images or TEST_IMAGES) * pgd_passes(evaluation.steps, evaluation.restarts)
    parts.append(Cost(f"PGD, {networks} networks", 0, None, slower * pgd))
    for attack in (attack for attack in evaluation.attacks if attack.name == "autoattack"):
        images = attack.images or TEST_IMAGES
        passes = slower * networks * images * autoattack_passes()
        parts.append(Cost(f"AutoAttack, {images:,} images each", 0, None, passes))
    return parts


def table(recipe: Recipe, images_per_s: float) -> str:
    """Markdown table with a line per part of the curve, and their sum."""
    lines = ["| part | epochs | mean area | million passes | GPU-hours |", "|---|---|---|---|---|"]
    every = costs(recipe)
    total = Cost("**all**", sum(cost.epochs for cost in every), None, sum(cost.passes for cost in every))
    for cost in [*every, total]:
        epochs, area = cost.epochs or "", "" if cost.area is None else f"{cost.area:.2f}"
        hours = cost.passes / images_per_s / SECONDS_PER_HOUR
        lines.append(f"| {cost.part} | {epochs} | {area} | {cost.passes / 1e6:,.1f} | {hours:.1f} |")
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("overrides", nargs="*", help="such as phases.pretrain.epochs=90")
    parser.add_argument("--images-per-s", type=float, required=True, help="R: forward and backward passes of one GPU")
    options = parser.parse_args(arguments)
    print(table(load_recipe(options.recipe, options.overrides), options.images_per_s))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
