"""A recipe that takes seconds on real images, for tests that train."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from pipeline.recipe.schema import Recipe, parse_recipe
from tests.support.commands import ROOT
from tests.support.techniques import own_values


def small_values(data: Path) -> dict[str, Any]:
    """20 steps per epoch, each of 64 images in 4 micro-batches; 2 epochs per phase, one sparsity."""
    values = YAML(typ="safe", pure=True).load(ROOT / "recipes" / "fashion_mnist.yaml")
    phase = {"epochs": 2, "lr": 0.05, "weight_decay": 1.0e-4}
    values |= {
        "name": "small",
        "objective": {"name": "pgd", "steps": 2, "step_size": "1/15"},
        "phases": {"pretrain": phase, "prune": phase, "finetune": phase},
        "sparsity": {"keep_fractions": [0.1]},
        "batch": {"batch_per_step": 64, "micro_batch": 16},
        "workers": {"count": 1, "threads": 1, "device": "cpu"},
        "evaluation": {"steps": 2, "step_size": "1/20", "chunk": 200, "honesty_images": 10, "validation_steps": 1},
        "tracking": {"log_every_steps": 8, "wandb": "disabled"},
    }
    values["data"] |= {
        "train_file": str(data / "train.beton"),
        "test_file": str(data / "test.beton"),
        "validation_images": 200,
        "train_images": 1280,
    }
    return values


def small_recipe(folder: Path, /, **sections: Any) -> Recipe:
    """`small_values` with whole sections replaced or, if both are mappings, updated.

    Another technique keeps those of the objective's values whose keys it has.
    """
    values = small_values(folder)
    if technique := sections.get("objective", {}).get("name"):
        values["objective"] = own_values(technique, values["objective"])
    for key, value in sections.items():
        values[key] = (
            {**values[key], **value} if isinstance(value, dict) and isinstance(values.get(key), dict) else value
        )
    return parse_recipe(values, "small")


def two_worker_recipe(data: Path, **workers: Any) -> Recipe:
    """For runs with faults: two workers, hence ZeRO 1, and checkpoints every 9 steps, never at an epoch's end, which is
    after 20."""
    return small_recipe(
        data,
        sparsity={"baselines": []},
        data={"augmentation": "pad_crop_flip", "train_images": 640, "validation_images": 100},
        batch={"batch_per_step": 32, "micro_batch": 8},
        evaluation={"images": 200, "chunk": 50},
        workers={"count": 2, **workers},
        checkpoint={"every_steps": 9, "keep": 2},
    )
