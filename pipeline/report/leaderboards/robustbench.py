"""RobustBench's files: one `model_info/<dataset>/<threat model>/<id>.json` per network.

Croce et al., NeurIPS 2021 Datasets and Benchmarks; repository RobustBench/robustbench, read at version 1.1.1. The keys
are those of its files there and of `ModelInfo` in its `utils.py`; percentages are texts of two decimals. CIFAR's 10,000
test images are used as they are, ImageNet's by a list of 5,000, prepared as `pipeline.data.loading.image_list` does:
its usual preprocessing, "Res256Crop224". No key says how much of a network is pruned; the footnote does.
"""

from __future__ import annotations

import re
from fractions import Fraction
from pathlib import Path
from typing import Any

from pipeline.evaluation.result import KINDS, EvaluationResult
from pipeline.recipe.fields import canonical_decimal
from pipeline.report.leaderboards.rules import (
    ENOUGH,
    NotAccepted,
    Paper,
    autoattack_result,
    threat_model_of,
    unchanged,
)
from pipeline.report.results import NetworkResult, RunResult

BALLS: dict[tuple[str, str], Fraction] = {
    ("cifar10", "linf"): Fraction(8, 255),
    ("cifar10", "l2"): Fraction(1, 2),
    ("cifar100", "linf"): Fraction(8, 255),
    ("imagenet", "linf"): Fraction(4, 255),
}
"""(data set, norm) of a leaderboard -> eps."""
FOLDERS = {"linf": "Linf", "l2": "L2"}
CLASSES = {"cifar10": 10, "cifar100": 100, "imagenet": 1000}
CIFAR_IMAGES, CIFAR_SIZE = 10_000, 32
LISTED = 5_000
LIST = "imagenet_test_image_ids.txt"
LIST_SHA256 = "d4121626d07722a0126c35b1563042e46a546f1a05ce705f2cdc635896d58574"
"""Of the lines of its helper_files/imagenet_test_image_ids.txt, by `listed_images.list_sha256`."""
ARCHITECTURES = (
    (r"resnet(\d+)(_cifar)?", r"ResNet-\1"),
    (r"wrn_(\d+)_(\d+)", r"WideResNet-\1-\2"),
    (r"wide_resnet(\d+)_2", r"WideResNet-\1-2"),
)
"""Names of networks -> how its entries write them; others keep theirs."""


def model_info(run: RunResult, network: NetworkResult, paper: Paper) -> tuple[str, dict[str, Any]]:
    """(place of the file, its content). additional_data is None where nobody here knows: of weights of others.

    Errors: NotTheirs.
    """
    recipe = run.recipe
    dataset, (norm, eps) = recipe.data.dataset, threat_model_of(recipe)
    if (ball := BALLS.get((dataset, norm))) is None:
        there = ", ".join(f"{name} {norm}" for name, norm in BALLS)
        raise NotAccepted(f"there is no leaderboard for {dataset} {norm}; there is {there}")
    if eps != ball:
        raise NotAccepted(f"the eps for {dataset} {norm} is {ball}, and the recipe's threat_model.eps is {eps}")
    if recipe.model.num_classes != CLASSES[dataset]:
        raise NotAccepted(f"{dataset} has {CLASSES[dataset]} classes, and this network {recipe.model.num_classes}")

    def of_images(path: Path, result: EvaluationResult) -> str:
        return _of_list(run, result) if dataset == "imagenet" else _of_cifar(run, result)

    _, result = autoattack_result(run, network, of_images)
    clean, robust = (f"{100 * result.accuracy(kind).value:.2f}" for kind in KINDS)
    content = {
        "link": paper.link,
        "name": paper.title,
        "authors": paper.authors,
        "additional_data": None if recipe.model.weights else recipe.data.extra_fraction is not None,
        "number_forward_passes": 1,
        "dataset": dataset,
        "venue": paper.venue,
        "architecture": _architecture(recipe.model.arch),
        "eps": f"{float(eps):g}" if norm == "l2" else str(eps),
        "clean_acc": clean,
        "reported": robust,
        "autoattack_acc": robust,
        "unreliable": any((result.flags or {}).values()),
    }
    if network.name != "dense":
        content["footnote"] = f"{network.pruned} of the connections are pruned ({network.name})."
    return f"model_info/{dataset}/{FOLDERS[norm]}/{paper.id}_{_suffix(network)}.json", content


def _of_list(run: RunResult, result: EvaluationResult) -> str:
    if result.image_list_sha256 == LIST_SHA256 and result.images == LISTED:
        return ENOUGH
    return (
        f"it was judged on {result.images:,} images ({result.preprocessing or 'read from the FFCV file'}), and "
        f"RobustBench's are the {LISTED:,} of its list, prepared by torchvision: python -m launch evaluate "
        f"{run.folder} --attack autoattack --folder DIR --image-list {LIST}"
    )


def _of_cifar(run: RunResult, result: EvaluationResult) -> str:
    if not unchanged(run.recipe, CIFAR_SIZE):
        return "its images were resized or cropped, and RobustBench takes them as they are"
    if result.images != CIFAR_IMAGES:
        return (
            f"it was judged on {result.images:,} of the {CIFAR_IMAGES:,} test images: python -m launch evaluate "
            f"{run.folder} --attack autoattack --images all"
        )
    return ENOUGH


def _architecture(arch: str) -> str:
    for pattern, written in ARCHITECTURES:
        if found := re.fullmatch(pattern, arch):
            return found.expand(written)
    return arch


def _suffix(network: NetworkResult) -> str:
    keep = f"keep-{canonical_decimal(network.keep_fraction)}"
    return {"dense": "dense", "HYDRA": keep}.get(network.name, f"{keep}_{network.name.lower()}")
