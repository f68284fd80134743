"""The recipes of the golden losses, seconds each: every objective and phase, and the options that change a step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.recipe.schema import Recipe, parse_recipe
from tests.support.small_recipe import small_values

STEPS = 20
"""Optimizer steps of each stage."""
EPOCHS, BATCH = 2, 16
PHASES = ("pretrain", "prune", "finetune")
SEARCH = PHASES[:2]
ATTACK = {"steps": 2, "step_size": "1/15"}
ONE_STEP = {"step_size": "1/10", "overfitting_guard": None}
LINF, L2 = {"norm": "linf", "eps": "1/10"}, {"norm": "l2", "eps": "1/4"}
SGD = {"epochs": EPOCHS, "lr": 0.05, "weight_decay": 1.0e-4, "warmup_epochs": 0.5}
SLOW = SGD | {"lr": 0.01}
"""For networks with BatchNorm: rounding errors grow with the learning rate there."""
ADAM = {"epochs": EPOCHS, "lr": 0.001, "optimizer": "adam"}
SMALL_CNN = {"arch": "small_cnn"}
"""With BatchNorm; the other recipes train a network without it, which takes half the time."""
TINY_IMAGES = {"image_size": 12, "augmentation": "none"}
"""Symbolic bounds take a forward pass per pixel."""
RECIPES: dict[str, dict[str, Any]] = {
    "clean": {"objective": {"name": "clean"}},
    "pgd, every baseline": {
        "objective": {"name": "pgd", **ATTACK},
        "phases": dict.fromkeys(PHASES, SLOW),
        "sparsity": {"baselines": ["magnitude", "random", "snip"], "baseline_epochs": "finetune_epochs"},
        "model": SMALL_CNN,
    },
    "pgd, masks that change": {
        "objective": {"name": "pgd", **ATTACK},
        "phases": dict.fromkeys(PHASES, SGD),
        "sparsity": {
            "baselines": ["gradual", "flying_bird", "flying_bird_plus"],
            "baseline_epochs": "finetune_epochs",
        },
        "evaluation": {"validation_steps": 1},
    },
    "fgsm, eps warm-up, averaged, growing images": {
        "objective": {"name": "fgsm", "eps_warmup": 0.5, **ONE_STEP},
        "phases": dict.fromkeys(SEARCH, SLOW | {"ema_decay": 0.9, "resolution": {"smallest": 32, "full_from": 1}}),
        "data": {"augmentation": "random_resized_crop", "image_size": 64},
        "model": SMALL_CNN,
    },
    "nfgsm, learned allocation": {
        "objective": {"name": "nfgsm", **ONE_STEP},
        "sparsity": {"allocation": "learned", "score_init": "kaiming_normal", "score_weight_decay": 0.0},
    },
    "fgsm_pgi": {"objective": {"name": "fgsm_pgi", **ONE_STEP}},
    "pgd, harp and s2ap": {
        "objective": {"name": "pgd", **ATTACK},
        "phases": dict.fromkeys(PHASES, SGD) | {"prune": SGD | {"lr": 1.0}},  # so that masks change within 20 steps
        "sparsity": {"baselines": [{"name": "hydra", "allocation": "harp"}, "s2ap"]},
    },
    "free": {
        "objective": {"name": "free", "replays": EPOCHS, **ONE_STEP},
        "phases": dict.fromkeys(SEARCH, SGD | {"epochs": 1}),
    },
    "trades, global allocation, frozen BatchNorm": {
        "objective": {"name": "trades", **ATTACK},
        "phases": dict.fromkeys(SEARCH, SLOW),
        "threat_model": L2,
        "sparsity": {"allocation": "global", "batchnorm": "frozen"},
        "model": SMALL_CNN,
    },
    "noise": {"objective": {"name": "noise", "sigma": "1/4"}, "threat_model": L2},
    "stability, erk allocation": {
        "objective": {"name": "stability", "sigma": "1/4"},
        "threat_model": L2,
        "sparsity": {"allocation": "erk"},
    },
    "smoothadv": {
        "objective": {"name": "smoothadv", "sigma": "1/4", "noise_samples": 2, **ATTACK},
        "threat_model": L2,
    },
    "ibp": {"objective": {"name": "ibp"}, "data": TINY_IMAGES},
    "crown_ibp": {"objective": {"name": "crown_ibp"}, "phases": dict.fromkeys(PHASES, SGD), "data": TINY_IMAGES},
    "mixtrain, adam": {
        "objective": {"name": "mixtrain"},
        "phases": dict.fromkeys(PHASES, ADAM),
        "data": TINY_IMAGES,
    },
}
"""Name -> the recipe's sections that differ from the defaults below."""
UNSTEADY = (
    "pgd, every baseline",
    "fgsm, eps warm-up, averaged, growing images",
    "trades, global allocation, frozen BatchNorm",
    "mixtrain, adam",
)
"""Recipes in which rounding errors grow: they use BatchNorm, or Adam, which divides by small gradients."""


def golden_recipe(data: Path, name: str) -> Recipe:
    """The recipe `name` on the data files in the folder `data`; each of its stages takes `STEPS` steps."""
    sections, values = RECIPES[name], small_values(data)
    values |= {
        "objective": sections["objective"],
        "threat_model": sections.get("threat_model", LINF),
        "phases": {"finetune": None, **sections.get("phases", dict.fromkeys(SEARCH, SGD))},
        "batch": {"batch_per_step": BATCH, "micro_batch": BATCH // 2},
        "tracking": {"log_every_steps": 1, "wandb": "disabled"},
    }
    values["data"] |= {
        "train_images": BATCH * STEPS // EPOCHS,
        "validation_images": BATCH,
        "augmentation": "pad_crop_flip",
        **sections.get("data", {}),
    }
    values["model"] |= {"arch": "cnn_small", **sections.get("model", {})}
    values["sparsity"] |= {"baselines": [], **sections.get("sparsity", {})}
    values["evaluation"] |= {
        "images": 2,
        "chunk": 2,
        "n0": 2,
        "n": 2,
        "honesty_images": 0,
        "validation_steps": 0,
        "attacks": [],
        **sections.get("evaluation", {}),
    }
    return parse_recipe(values, name)
