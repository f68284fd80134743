"""An ONNX file in int8: weights per output channel, symmetric, so that pruned connections stay zero.

Activations are uint8 with a scale and zero point per tensor, chosen on calibration images (static quantisation,
QuantizeLinear and DequantizeLinear nodes), which every runtime for ONNX reads.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

from pipeline.deployment.onnx_file import INPUT
from pipeline.run.files import replacing, settle_file


class _Batches(CalibrationDataReader):
    """Calibration images as ONNX Runtime's quantiser asks for them."""

    def __init__(self, batches: Iterable[NDArray[np.float32]]) -> None:
        self._batches: Iterator[NDArray[np.float32]] = iter(batches)

    def get_next(self) -> dict[str, NDArray[np.float32]] | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        batch = next(self._batches, None)
        return None if batch is None else {INPUT: batch}


def write_int8(float_file: Path, batches: Iterable[NDArray[np.float32]], path: Path) -> None:
    """Quantise `float_file`, which `onnx_file.write_onnx` wrote; `batches` are calibration images in [0, 1]."""
    with replacing(path) as temporary, tempfile.TemporaryDirectory(dir=path.parent) as folder, _quiet():
        prepared = Path(folder) / "prepared.onnx"
        quant_pre_process(str(float_file), str(prepared))
        quantize_static(
            str(prepared),
            str(temporary),
            _Batches(batches),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            extra_options={"WeightSymmetric": True},
        )
        settle_file(temporary)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without advice about preprocessing, which is done here, on the root logger."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(disabled)
