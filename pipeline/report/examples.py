"""Test images that a network classifies correctly, their PGD adversarial examples, and its predictions on both."""

from __future__ import annotations

import functools
import time
from dataclasses import dataclass, replace
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
from pipeline.report.per_class import read_labelled_verdicts
from pipeline.report.results import NetworkResult, RunResult
from pipeline.robustness.attacks import crafting
from pipeline.run.files import sha256_of
from pipeline.run.layout import StageFolder

COUNT = 8
CANDIDATES = 2 * COUNT
"""Images among which COUNT correctly classified ones are looked for: the network may not be evaluated yet, or was on
another device."""
MOST_S = 20.0
"""CPU time of one thread for attacking images: a large network on a CPU has fewer examples."""


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
    """Examples of one network of a run, and the class names by label."""

    network: NetworkResult
    attack: str
    class_names: list[str]
    examples: Examples


def examples(
    network: nn.Module,
    images: Tensor,
    labels: Tensor,
    ids: NDArray[np.int64],
    attack: Pgd,
    count: int = COUNT,
    most_s: float = MOST_S,
) -> Examples | None:
    """Attack the first `count` of images [n, ...] in [0, 1] that `network` assigns to their classes labels [n], with
    the first restart of `attack`; None if it assigns none.

    Noise is keyed by ids [n], so an image's example equals the evaluation's up to rounding. The CPU time of the first
    image decides how many of the others fit into `most_s` seconds. Without a threat model images are unchanged.
    """
    with crafting(network):
        with torch.no_grad():
            right = (network(images).argmax(dim=1) == labels).nonzero().flatten()[:count]
        if not len(right):
            return None
        x, y, chosen_ids = images[right], labels[right], ids[right.cpu().numpy()]
        start = time.thread_time()
        adversarial = [next(attack.examples(network, x[:1], y[:1], chosen_ids[:1]), x[:1])]
        took_s = time.thread_time() - start
        fitting = min(len(x), 1 + int(max(most_s - took_s, 0.0) / max(took_s, 1e-6)))
        if fitting > 1:
            rest = slice(1, fitting)
            adversarial.append(next(attack.examples(network, x[rest], y[rest], chosen_ids[rest]), x[rest]))
        x, x_adv = x[:fitting], torch.cat(adversarial)
        with torch.no_grad():
            (clean_confidence, clean), (adversarial_confidence, attacked) = (
                network(shown).softmax(dim=1).max(dim=1) for shown in (x, x_adv)
            )
    return Examples(
        ids=chosen_ids[:fitting],
        labels=y[:fitting].cpu().numpy(),
        clean=x.cpu().numpy(),
        adversarial=x_adv.cpu().numpy(),
        clean_prediction=clean.cpu().numpy(),
        adversarial_prediction=attacked.cpu().numpy(),
        clean_confidence=clean_confidence.cpu().numpy(),
        adversarial_confidence=adversarial_confidence.cpu().numpy(),
    )


def examples_of(run: RunResult) -> RunExamples | str:
    """Examples spread evenly over the correctly classified test images, on the run's sparsest finished HYDRA network,
    or why there are none."""
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
        verdicts = read_labelled_verdicts(network, recipe.model.num_classes)
        right = None if verdicts is None else tuple(verdicts.ids[verdicts.clean_correct].tolist())
        file = StageFolder(network.folder).network
        data = path, recipe.data.image_size, recipe.data.augmentation
        run_examples = _examples(file, sha256_of(file), data, attack, right)
    except (DataError, LoaderError, ValueError) as error:
        return str(error)
    if run_examples is None:
        return "the network classifies none of the images correctly"
    return RunExamples(network, attack.title, *run_examples)


@functools.lru_cache(maxsize=1)  # the page and wandb show the same ones
def _examples(
    file: Path, sha256: str, data: tuple[Path, int, str], attack: Pgd, right: tuple[int, ...] | None
) -> tuple[list[str], Examples] | None:
    """Class names, and examples among the images `right` of a test file (None: all), for the network in `file`.

    `data`: the test file, image size and augmentation.
    """
    path, image_size, augmentation = data
    with Loader(path, image_size=image_size, threads=1, compiled=False) as loader:
        images = EvaluationImages.all_of(loader, augmentation)
        if right is not None:
            images = replace(images, ids=np.array(right, np.int64))
        spread = images.spread(CANDIDATES).ids
        ids = np.concatenate([spread[::2], spread[1::2]])  # evenly spread, and so are the first COUNT
        if not len(ids):
            return None
        batch = loader.read(ids, images.crops(ids))
    # On the CPU even if there is a GPU: a run may be training on it.
    few = examples(load_model(file), *batch.to(torch.device("cpu")), ids, attack)
    return None if few is None else (loader.class_names, few)
