"""Submission to the adversarial pruning benchmark: a taxonomy entry, and an issue with accuracies.

Piras et al., "Adversarial Pruning: A Survey and Benchmark of Pruning Methods for Adversarial Robustness", 2024 (arXiv
2409.01249); repository pralab/AdversarialPruningBenchmark. The keys of the entry are spelled as in its
`taxonomy/taxonomy.json`, blanks and colons included; the issue follows its template
`.github/ISSUE_TEMPLATE/new-ap-method.md`, as accuracies have no JSON format there. Model keys are those of
`model_key_maker` (`utils/utils.py`). Evaluation is on the first 10,000 test images (`utils/test.py`) at linf 8/255, in
its code 0.031.

Its second attack, HO-FMN, is not part of this project, as the issue states. Its README announces ImageNet, but the
repository has neither model keys nor an evaluation for it, so such runs are refused.
"""

from __future__ import annotations

from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.evaluation.chunks import read_verdicts
from pipeline.evaluation.result import EvaluationResult
from pipeline.recipe.methods import HYDRA
from pipeline.recipe.schema import Recipe
from pipeline.recipe.stages import DENSE, stages_of
from pipeline.report.leaderboards.rules import (
    MATCHING,
    NotAccepted,
    Paper,
    autoattack_result,
    threat_model_of,
    uses_original_images,
)
from pipeline.report.results import RunResult

IMAGES, SIZE = 10_000, 32
EPS = Fraction(8, 255)
DATASETS = {"cifar10": "CIFAR10", "svhn": "SVHN"}
ARCHITECTURES = {"resnet18_cifar": "R18", "vgg16_cifar": "V16", "vgg16_bn_cifar": "V16"}
PRUNED = {Decimal("0.1"): "90", Decimal("0.05"): "95", Decimal("0.01"): "99"}
TRAINING = {
    "clean": "Natural Training (NT)",
    "pgd": "Adversarial Training (AT) PGD",
    "trades": "Adversarial Training (AT) TRADES",
}
"""Objective -> the benchmark's term; other objectives keep their own name."""
LOCALITY = {
    "uniform": "Local Pruning (L)",
    "erk": "Local Pruning (L)",
    "global": "Global Pruning (G)",
    "learned": "Global Pruning (G)",
    "harp": "Global Pruning (G)",
}
"""Allocation -> whether connections compete within a layer or across all layers."""


def pruning_entry(run: RunResult, paper: Paper) -> dict[str, Any]:
    """File name -> content, for the HYDRA networks of a run. Errors: NotAccepted; ValueError for damaged verdicts."""
    recipe = run.recipe
    dataset, architecture = DATASETS.get(recipe.data.dataset), ARCHITECTURES.get(recipe.model.arch)
    if dataset is None or architecture is None:
        raise NotAccepted(
            f"it accepts {' and '.join(DATASETS)} with {' or '.join(ARCHITECTURES)}; this run is "
            f"{recipe.data.dataset} with {recipe.model.arch}"
        )
    norm, eps = threat_model_of(recipe)
    if (norm, eps) != ("linf", EPS):
        raise NotAccepted(f"it evaluates at linf eps {EPS}, and the recipe's threat model is {norm} eps {eps}")
    if not uses_original_images(recipe, SIZE):
        raise NotAccepted("the images were resized or cropped, and it uses the originals")
    if recipe.sparsity.structure != "unstructured":
        raise NotAccepted(
            f"the entry is of unstructured pruning, and sparsity.structure is {recipe.sparsity.structure}"
        )
    networks = {pruned: network for keep, pruned in PRUNED.items() if (network := run.find("HYDRA", keep))}
    if missing := [f"{pruned} %" for pruned in PRUNED.values() if pruned not in networks]:
        raise NotAccepted(f"it requires 90, 95 and 99 % pruned, and the recipe lacks {' and '.join(missing)}")

    def image_mismatch(path: Path, result: EvaluationResult) -> str:
        if _first_images(path) is not None:
            return MATCHING
        return (
            f"{result.images:,} images were evaluated, but not all of the first {IMAGES:,}: python -m launch evaluate "
            f"{run.folder} --attack autoattack --images all"
        )

    key, sections = f"HYDRA_{paper.id}", []
    for pruned, network in networks.items():
        path, _ = autoattack_result(run, network, image_mismatch)
        columns = _first_images(path)
        assert columns is not None
        clean, robust = (100 * float(column.mean()) for column in columns)
        model = f"{key}_{architecture}_{dataset}_US_{pruned}"
        sections.append(_section(len(sections) + 1, model, clean, robust))
    return {"taxonomy.json": [_taxonomy(recipe, paper, key)], "new-ap-method.md": _issue(recipe, sections)}


def _first_images(path: Path) -> tuple[NDArray[np.bool_], NDArray[np.bool_]] | None:
    """(clean, robust) verdicts of the first IMAGES samples; None if some were not evaluated."""
    verdicts = read_verdicts(path.with_suffix(".parquet"))
    ids, clean, robust = (verdicts[name] for name in ("sample_id", "clean_correct", "robust_correct"))
    first = ids < IMAGES
    return (clean[first], robust[first]) if first.sum() == IMAGES else None


def _taxonomy(recipe: Recipe, paper: Paper, key: str) -> dict[str, str]:
    own = [stage for stage in stages_of(recipe) if stage.label in (DENSE, HYDRA.label)]
    words = {stage.phase: TRAINING.get(stage.objective.name, stage.objective.name) for stage in own}
    return {
        "link_to_paper": paper.link,
        "ap_key": key,
        "Type of Pipeline:": "A-Methods Pruning After Training",
        "A: Pretraining ": words["pretrain"],
        "A: Finetuning": words.get("finetune", "None"),
        "A: OneShot (1S) vs Iterative (IT)": "1S",
        "Pruning structure": "Unstructured (US)",
        "Pruning locality": LOCALITY[recipe.sparsity.allocation],
        "Pruning criterion": "Least Importance Score (LIS)",
    }


def _section(number: int, model: str, clean: float, robust: float) -> str:
    return f"""\
## Evaluation Results of Model n°{number}
_Model GDrive:_ "{model}" : ["your_gdrive_link_id", ".safetensors"]
_Distances GDrive:_ none, HO-FMN was not run

_Clean Accuracy:_ {clean:.2f}
_Robust Accuracy (AA):_ {robust:.2f}
_Robust Accuracy (HO-FMN):_ not run
"""


def _issue(recipe: Recipe, sections: list[str]) -> str:
    mean, std = (", ".join(f"{value:g}" for value in values) for values in (recipe.model.mean, recipe.model.std))
    results = "\n".join(sections)
    return f"""\
# Loading Section

## JSON Entry
The one in taxonomy.json.

{results}
## Architecture details and normalization
All models need normalization: mean {mean}; std {std}. Masks are multiplied in. The names of the weights are those of
{recipe.model.arch} in this project.
"""
