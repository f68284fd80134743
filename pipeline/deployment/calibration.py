"""Images that choose the ranges of an int8 file: held-out training images, clean and adversarial."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.data.loading.loader import Loader
from pipeline.data.loading.sampling import held_out
from pipeline.evaluation.images import EvaluationImages
from pipeline.evaluation.measures.pgd import Pgd
from pipeline.models import Network
from pipeline.recipe.schema import Recipe

IMAGES = 256
"""Held-out images at most; as many adversarial ones join them."""
BATCH = 32


def calibration_batches(network: Network, recipe: Recipe) -> Iterator[NDArray[np.float32]]:
    """Batches of `recipe.data`'s held-out images as the network sees them, each followed by its PGD examples.

    Under attack, activations leave the ranges of clean images. Without a threat model, or for networks that are not
    evaluated by PGD, clean images only. Errors: DataError.
    """
    data, evaluation = recipe.data, recipe.evaluation
    attack = Pgd.of(recipe.threat_model, evaluation, recipe.seed) if evaluation.step_size is not None else None
    with Loader(Path(data.train_file), image_size=data.image_size, threads=1) as loader:
        _, ids = held_out(loader.num_samples, data.validation_images)
        images = EvaluationImages(loader, data.augmentation, ids).spread(IMAGES)
        for batch in images.batches(images.chunks(BATCH)):
            x, y = batch.to(torch.device("cpu"))
            yield x.numpy()
            if attack is not None:
                for adversarial in attack.examples(network, x, y, batch.ids.numpy()):
                    yield adversarial.numpy()
