"""RobustBench entries: one `model_info/<dataset>/<threat model>/<id>.json` per network.

Croce et al., NeurIPS 2021 Datasets and Benchmarks; repository RobustBench/robustbench, read at version 1.1.1. The keys
are those of its files and of `ModelInfo` in its `utils.py`; percentages are strings with two decimals. CIFAR's 10,000
test images are unmodified; ImageNet's are a list of 5,000 with the default preprocessing "Res256Crop224", as in
`pipeline.data.loading.image_list`. There is no key for sparsity; the footnote states it.
"""

from __future__ import annotations

import re
from fractions import Fraction
from pathlib import Path
from typing import Any

from pipeline.evaluation.result import KINDS, EvaluationResult
from pipeline.recipe.stages import DENSE
from pipeline.report.leaderboards.rules import (
    MATCHING,
    NotAccepted,
    Paper,
    autoattack_result,
    threat_model_of,
    uses_original_images,
)
from pipeline.report.results import NetworkResult, RunResult

BALLS: dict[tuple[str, str], Fraction] = {
    ("cifar10", "linf"): Fraction(8, 255),
    ("cifar10", "l2"): Fraction(1, 2),
    ("cifar100", "linf"): Fraction(8, 255),
    ("imagenet", "linf"): Fraction(4, 255),
}
"""(data set, norm) of each leaderboard -> eps."""
FOLDERS = {"linf": "Linf", "l2": "L2"}
CLASSES = {"cifar10": 10, "cifar100": 100, "imagenet": 1000}
CIFAR_IMAGES, CIFAR_SIZE = 10_000, 32
LISTED = 5_000
LIST = "imagenet_test_image_ids.txt"
LIST_SHA256 = "d4121626d07722a0126c35b1563042e46a546f1a05ce705f2cdc635896d58574"
"""Hash of its helper_files/imagenet_test_image_ids.txt, by `image_list.list_sha256`."""
ARCHITECTURES = (
    (r"resnet(\d+)(_cifar)?", r"ResNet-\1"),
    (r"wrn_(\d+)_(\d+)", r"WideResNet-\1-\2"),
    (r"wide_resnet(\d+)_2", r"WideResNet-\1-2"),
)
"""Architecture -> RobustBench's spelling; others keep their name."""


def model_info(run: RunResult, network: NetworkResult, paper: Paper) -> tuple[str, dict[str, Any]]:
    """(path of the file, its content). additional_data is None, unknown, for imported weights.

    Errors: NotAccepted.
    """
    recipe = run.recipe
    dataset, (norm, eps) = recipe.data.dataset, threat_model_of(recipe)
    if (ball := BALLS.get((dataset, norm))) is None:
        available = ", ".join(f"{name} {norm}" for name, norm in BALLS)
        raise NotAccepted(f"there is no leaderboard for {dataset} {norm}, only for {available}")
    if eps != ball:
        raise NotAccepted(f"its eps for {dataset} {norm} is {ball}, and the recipe's threat_model.eps is {eps}")
    if recipe.model.num_classes != CLASSES[dataset]:
        raise NotAccepted(f"{dataset} has {CLASSES[dataset]} classes, and this network has {recipe.model.num_classes}")

    def image_mismatch(path: Path, result: EvaluationResult) -> str:
        return _imagenet_mismatch(run, result) if dataset == "imagenet" else _cifar_mismatch(run, result)

    _, result = autoattack_result(run, network, image_mismatch)
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


def _imagenet_mismatch(run: RunResult, result: EvaluationResult) -> str:
    if result.image_list_sha256 == LIST_SHA256 and result.images == LISTED:
        return MATCHING
    return (
        f"it was evaluated on {result.images:,} images ({result.preprocessing or 'read from the FFCV file'}), and "
        f"RobustBench uses the {LISTED:,} of its list, preprocessed by torchvision: python -m launch evaluate "
        f"{run.folder} --attack autoattack --folder DIR --image-list {LIST}"
    )


def _cifar_mismatch(run: RunResult, result: EvaluationResult) -> str:
    if not uses_original_images(run.recipe, CIFAR_SIZE):
        return "its images were resized or cropped, and RobustBench uses the originals"
    if result.images != CIFAR_IMAGES:
        return (
            f"it was evaluated on {result.images:,} of the {CIFAR_IMAGES:,} test images: python -m launch evaluate "
            f"{run.folder} --attack autoattack --images all"
        )
    return MATCHING


def _architecture(arch: str) -> str:
    for pattern, template in ARCHITECTURES:
        if match := re.fullmatch(pattern, arch):
            return match.expand(template)
    return arch


def _suffix(network: NetworkResult) -> str:
    if network.stage == "pretrain":
        return DENSE
    return network.stage.removesuffix("/finetune").removesuffix("/prune").replace("/", "_")
