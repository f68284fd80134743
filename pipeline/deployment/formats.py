"""The formats of exported networks, the files beside them, and how strongly they are attacked. Imports no torch."""

from __future__ import annotations

from typing import Literal, get_args

Format = Literal["onnx", "onnx-int8", "torch"]
FORMATS: tuple[Format, ...] = get_args(Format)
FILES: dict[Format, str] = {"onnx": "model.onnx", "onnx-int8": "model-int8.onnx", "torch": "model.pt2"}
"""Format -> name of its file."""
COMPRESSION = 9
"""Level of gzip."""
CHECK_IMAGES = "check.npz"
"""Images, and the logits of the network and of every file for them."""
VERDICTS = "verdicts.parquet"
"""Of the attack on a file, one row per image."""

AttackStrength = Literal["standard", "reduced"]
STRENGTHS: tuple[AttackStrength, ...] = get_args(AttackStrength)
