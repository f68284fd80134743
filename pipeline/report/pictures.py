"""Images for people: as text that a page carries inside itself, or as pixels."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.report.examples import Shown

EXACT_SIZE = 64
"""Images of up to so many pixels a side are PNGs; of larger ones that would be megabytes, and they are JPEGs."""


def cards(shown: Shown) -> list[dict[str, Any]]:
    """For every example the pictures (clean, difference, attacked) and what is written below them."""
    found, e = [], shown.examples
    for i in range(len(e.ids)):
        difference, largest = amplified(e.clean[i], e.adversarial[i])
        found.append(
            {
                "id": int(e.ids[i]),
                **answers(shown, i),
                "clean": data_uri(e.clean[i]),
                "difference": data_uri(difference),
                "attacked": data_uri(e.adversarial[i]),
                "largest": f"{255 * largest:.1f}/255",
            }
        )
    return found


def answers(shown: Shown, i: int) -> dict[str, str]:
    """What example `i` is, what the network says of it before and after the attack, and what that means."""
    e = shown.examples
    classes = (e.labels[i], e.clean_prediction[i], e.adversarial_prediction[i])
    true, before, after = (shown.class_names[int(label)] for label in classes)
    right = e.clean_prediction[i] == e.labels[i]
    stays = e.adversarial_prediction[i] == e.labels[i]
    return {
        "true": true,
        "before": f"{before}, {100 * e.clean_confidence[i]:.0f} %",
        "after": f"{after}, {100 * e.adversarial_confidence[i]:.0f} %",
        "verdict": "wrong already" if not right else "withstands" if stays else "fooled",
    }


def amplified(clean: NDArray[np.float32], adversarial: NDArray[np.float32]) -> tuple[NDArray[np.float32], float]:
    """What an attack added to an image, grey where that is nothing and as strong as can be shown, and its largest."""
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
