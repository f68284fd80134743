"""The formats of exported networks. Imports no torch."""

from __future__ import annotations

from typing import Literal, get_args

Format = Literal["onnx", "onnx-int8", "torch"]
FORMATS: tuple[Format, ...] = get_args(Format)
FILES: dict[Format, str] = {"onnx": "model.onnx", "onnx-int8": "model-int8.onnx", "torch": "model.pt2"}
"""Format -> name of its file."""
COMPRESSION = 9
"""Level of gzip."""
