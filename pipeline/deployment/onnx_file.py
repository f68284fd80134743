"""A network as an ONNX file in float32, with its normalisation inside and BatchNorm folded into convolutions."""

from __future__ import annotations

import contextlib
import json
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray

from pipeline.models import Network
from pipeline.models.export import METADATA_KEY
from pipeline.run.files import replacing, settle_file

INPUT, OUTPUT = "images", "logits"
"""Names in the file: images [n, 3, height, width] float32 in [0, 1] -> logits [n, num_classes] float32, any n."""
TOLERANCE = 1e-5
"""Largest difference between the file's logits and the network's, as a share of the largest |logit| or absolute."""
CHECKED = 3
"""Images on which each file is compared with its network; not the number of the example that is traced."""


class CannotExport(ValueError):
    """The exporter cannot express the network, or its file computes something else; the message says what."""


def write_onnx(network: Network, image_size: int, path: Path, facts: dict[str, Any]) -> None:
    """Write `network` (in eval mode, on the CPU) as an ONNX file; `facts` (JSON values) go to its metadata.

    The file is read back and compared with the network before it replaces `path`. Errors: CannotExport.
    """
    example = random_images(2, image_size, seed=0)
    with replacing(path) as temporary:
        with _quiet():
            try:
                program = torch.onnx.export(
                    network,
                    (example,),
                    dynamo=True,
                    dynamic_shapes=({0: torch.export.Dim("n")},),
                    input_names=[INPUT],
                    output_names=[OUTPUT],
                    verbose=False,
                )
            except torch.onnx.errors.OnnxExporterError as error:
                raise CannotExport(f"ONNX's exporter cannot express this network: {_reason(error)}") from None
        assert program is not None
        model = _without_origin(program.model_proto)
        model.metadata_props.add(key=METADATA_KEY, value=json.dumps(facts, sort_keys=True))
        onnx.save(model, temporary)
        images = random_images(CHECKED, image_size, seed=1)
        check_same(network, images, logits_of(temporary, images.numpy()), "the ONNX file")
        settle_file(temporary)


def random_images(count: int, image_size: int, seed: int) -> torch.Tensor:
    """[count, 3, image_size, image_size] float32, uniform in [0, 1]."""
    return torch.rand(count, 3, image_size, image_size, generator=torch.Generator().manual_seed(seed))


def session_of(path: Path, threads: int = 1) -> onnxruntime.InferenceSession:
    """ONNX Runtime on the CPU."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def logits_of(path: Path, images: NDArray[np.float32]) -> NDArray[np.float32]:
    """The file's logits [n, num_classes] for images [n, 3, height, width]."""
    (logits,) = session_of(path).run([OUTPUT], {INPUT: images})
    return np.asarray(logits)


def check_same(network: Network, images: torch.Tensor, logits: NDArray[np.float32], what: str) -> None:
    """Errors: CannotExport if `logits` are not those of the network for `images`, within TOLERANCE."""
    with torch.inference_mode():
        expected = network(images).numpy()
    difference, scale = float(np.abs(logits - expected).max()), max(float(np.abs(expected).max()), 1.0)
    if not difference <= TOLERANCE * scale:  # also false for NaN
        raise CannotExport(f"{what} computes other logits than the network: they differ by up to {difference:.2g}")


def _reason(error: BaseException) -> str:
    """The innermost cause in one line: it names the layer or operator."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines)[:500] or type(error).__name__


def _without_origin(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model without the exporter's stack traces, which name files of this machine."""
    for parts in (model.graph.node, model.graph.value_info, model.graph.input, model.graph.output):
        for part in parts:
            part.ClearField("metadata_props")
            part.ClearField("doc_string")
    for tensor in model.graph.initializer:
        tensor.ClearField("doc_string")
        tensor.ClearField("metadata_props")
    model.graph.ClearField("metadata_props")
    model.graph.ClearField("doc_string")
    model.ClearField("metadata_props")
    return model


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's log and its own warnings about its use of torch; errors are raised as ever."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
