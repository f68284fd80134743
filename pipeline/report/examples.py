"""A few test images with their PGD adversarial examples, and the network's predictions on both."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pipeline.data.loading.loader import Loader
from pipeline.data.loading.prefetch import LoaderError
from pipeline.data.manifest import DataError, read_manifest
from pipeline.evaluation.images import EvaluationImages
from pipeline.evaluation.measures.pgd import Pgd
from pipeline.models.export import load_model
from pipeline.report.results import NetworkResult, RunResult
from pipeline.robustness.attacks import crafting
from pipeline.run.layout import StageFolder

COUNT = 8
MOST_S = 10.0
"""Time limit for attacking images: a large network on a CPU has fewer examples."""


@dataclass(frozen=True)
class Examples:
    """n images [n, channels, height, width] float32 in [0, 1], clean and adversarial, and predictions on both."""

    ids: NDArray[np.int64]
    labels: NDArray[np.int64]
    clean: NDArray[np.float32]
    adversarial: NDArray[np.float32]
    clean_prediction: NDArray[np.int64]
    adversarial_prediction: NDArray[np.int64]
    clean_confidence: NDArray[np.float32]
    """Softmax probability of the predicted class."""
    adversarial_confidence: NDArray[np.float32]


@dataclass(frozen=True)
class RunExamples:
    """Examples of one network of a run, and the class names."""

    network: NetworkResult
    attack: str
    class_names: list[str]
    examples: Examples


def examples(
    network: nn.Module, images: Tensor, labels: Tensor, ids: NDArray[np.int64], attack: Pgd, most_s: float = MOST_S
) -> Examples:
    """Attack images [n, ...] in [0, 1] of classes labels [n] one by one, with the first restart of `attack`.

    Noise is keyed by ids [n], so an image's example equals the evaluation's up to rounding. After `most_s` seconds the
    remaining images are skipped, but never the first. Without a threat model images are unchanged.
    """
    start, rows = time.monotonic(), []
    with crafting(network):
        for i in range(len(images)):
            if i and time.monotonic() - start > most_s:
                break
            x, y = images[i : i + 1], labels[i : i + 1]
            x_adv = next(attack.examples(network, x, y, ids[i : i + 1]), x)
            with torch.no_grad():
                both = torch.cat([network(x), network(x_adv)]).softmax(dim=1)
            confidence, prediction = both.max(dim=1)
            rows.append((x[0], x_adv[0], prediction, confidence))
    count = len(rows)
    clean, adversarial, predictions, confidences = (torch.stack(column).cpu() for column in zip(*rows, strict=True))
    return Examples(
        ids=ids[:count],
        labels=labels[:count].cpu().numpy(),
        clean=clean.numpy(),
        adversarial=adversarial.numpy(),
        clean_prediction=predictions[:, 0].numpy(),
        adversarial_prediction=predictions[:, 1].numpy(),
        clean_confidence=confidences[:, 0].numpy(),
        adversarial_confidence=confidences[:, 1].numpy(),
    )


def examples_of(run: RunResult) -> RunExamples | str:
    """Examples spread evenly over the test file, on the run's sparsest finished HYDRA network, or why not."""
    recipe = run.recipe
    finished = [n for n in run.networks if n.name == "HYDRA" and StageFolder(n.folder).network.is_file()]
    if not finished:
        return "no pruned network is finished"
    if recipe.objective.measure != "pgd" or recipe.threat_model is None:
        return "this recipe's networks are not evaluated by an attack"
    network = min(finished, key=lambda n: n.keep_fraction)
    path = Path(recipe.data.test_file)
    if not path.is_file():
        return "the test file is not on this machine"
    attack = Pgd.of(recipe.threat_model, recipe.evaluation, recipe.seed)
    try:
        if network.evaluation and read_manifest(path).sha256 != network.evaluation.data_sha256:
            return "the test file has changed since the evaluation"
        with Loader(path, image_size=recipe.data.image_size, threads=1) as loader:
            sample = EvaluationImages.all_of(loader, recipe.data.augmentation).spread(COUNT)
            batch = loader.read(sample.ids, sample.crops(sample.ids))
        module = load_model(StageFolder(network.folder).network)
    except (DataError, LoaderError, ValueError) as error:
        return str(error)
    # On the CPU even if there is a GPU: a run may be training on it.
    run_examples = examples(module, *batch.to(torch.device("cpu")), sample.ids, attack)
    return RunExamples(network, attack.title, loader.class_names, run_examples)
