"""Runtimes in which networks are measured: each opens a file or a network for some number of threads."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from pipeline.deployment.onnx_file import session_of

Call = Callable[[], object]
"""Runs one batch."""
Runner = Callable[[NDArray[np.float32]], Call]
"""Images [n, 3, height, width] in [0, 1] -> a call that computes their logits."""
Opener = Callable[[int], Runner]
"""Number of threads -> what runs batches with them."""
PRECISIONS = {"f32": "float32", "bf16": "bfloat16", "f16": "float16"}
"""OpenVINO's names of precisions -> torch's."""


def torch_opener(module: nn.Module) -> Opener:
    """torch, channels-last. The number of threads is that of the process while the calls run; opening sets it."""
    module.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]

    def open_module(threads: int) -> Runner:
        torch.set_num_threads(threads)

        def runner(images: NDArray[np.float32]) -> Call:
            batch = torch.from_numpy(images).to(memory_format=torch.channels_last)

            def call() -> object:
                with torch.inference_mode():
                    return module(batch)

            return call

        return runner

    return open_module


def onnxruntime_opener(path: Path) -> Opener:
    """ONNX Runtime. Errors, when it is opened: ValueError naming a file that ONNX Runtime refuses."""

    def open_session(threads: int) -> Runner:
        try:
            session = session_of(path, threads)
        except Exception as error:  # its errors have no class of their own in common
            raise ValueError(f"{path}: ONNX Runtime cannot run this file: {_one_line(error)}") from None
        name = session.get_inputs()[0].name
        return lambda images: lambda: session.run(None, {name: images})

    return open_session


def load_openvino() -> Any | None:
    """The module `openvino`; None where the extra `openvino` is not installed."""
    try:
        return importlib.import_module("openvino")
    except ImportError:
        return None


def openvino_precision(openvino: Any, path: Path) -> str:
    """In which OpenVINO computes what is not int8: on processors that have it, bfloat16 is its default.

    Errors: ValueError naming a file that OpenVINO refuses.
    """
    try:
        compiled = openvino.Core().compile_model(path, "CPU")
    except RuntimeError as error:
        raise ValueError(f"{path}: OpenVINO cannot run this file: {_one_line(error)}") from None
    name = str(compiled.get_property("INFERENCE_PRECISION_HINT").to_string())
    return PRECISIONS.get(name, name)


def openvino_opener(openvino: Any, path: Path) -> Opener:
    """OpenVINO, with its defaults but for the number of threads."""

    def open_model(threads: int) -> Runner:
        options = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
        request = openvino.Core().compile_model(path, "CPU", options).create_infer_request()
        return lambda images: lambda: request.infer({0: images})

    return open_model


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
