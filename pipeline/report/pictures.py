"""Example images for display: as data URIs for the page, or as pixels."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.report.examples import RunExamples

EXACT_SIZE = 64
"""Largest side, in pixels, of images encoded as PNG; larger ones are JPEG, because PNGs would take megabytes."""


def example_cards(run_examples: RunExamples) -> list[dict[str, Any]]:
    """Pictures (clean, difference, adversarial) and caption of every example."""
    cards, e = [], run_examples.examples
    for i in range(len(e.ids)):
        difference, largest = amplified(e.clean[i], e.adversarial[i])
        cards.append(
            {
                "id": int(e.ids[i]),
                **captions(run_examples, i),
                "clean": data_uri(e.clean[i]),
                "difference": data_uri(difference),
                "attacked": data_uri(e.adversarial[i]),
                "largest": f"{255 * largest:.1f}/255",
            }
        )
    return cards


def captions(run_examples: RunExamples, i: int) -> dict[str, str]:
    """True class, predictions before and after the attack, and verdict of example `i`."""
    e = run_examples.examples
    classes = (e.labels[i], e.clean_prediction[i], e.adversarial_prediction[i])
    true, before, after = (run_examples.class_names[int(label)] for label in classes)
    return {
        "true": true,
        "before": f"{before}, {100 * e.clean_confidence[i]:.0f} %",
        "after": f"{after}, {100 * e.adversarial_confidence[i]:.0f} %",
        "verdict": "robust" if e.adversarial_prediction[i] == e.labels[i] else "not robust",
    }


def amplified(clean: NDArray[np.float32], adversarial: NDArray[np.float32]) -> tuple[NDArray[np.float32], float]:
    """The perturbation scaled to the full range, with grey as zero, and its largest absolute value."""
    delta = adversarial - clean
    largest = float(np.abs(delta).max())
    return (0.5 + 0.5 * delta / largest if largest else np.full_like(delta, 0.5)), largest


def pixels_of(image: NDArray[np.float32]) -> NDArray[np.uint8]:
    """An image [3, height, width] in [0, 1] as [height, width, 3] uint8."""
    return np.ascontiguousarray(np.rint(255 * np.clip(image, 0, 1)).astype(np.uint8).transpose(1, 2, 0))


def data_uri(image: NDArray[np.float32]) -> str:
    """An image [3, height, width] in [0, 1] as a data: URI."""
    pixels = pixels_of(image)
    kind, stream = "png" if max(pixels.shape[:2]) <= EXACT_SIZE else "jpeg", io.BytesIO()
    Image.fromarray(pixels).save(stream, kind, quality=88, optimize=True)
    return f"data:image/{kind};base64,{base64.b64encode(stream.getvalue()).decode()}"
