"""Checks before the first step: every device computes correctly, and all workers have the same code, data and settings.

A node that fails is named, instead of spoiling a run. A network that a later stage could not bound is refused before
any stage trains it.
"""

from __future__ import annotations

import platform
from collections import Counter
from importlib import metadata
from typing import Any

import torch

from pipeline.data.agreement import check_data_files
from pipeline.data.manifest import DataError
from pipeline.models import build_network
from pipeline.recipe.file import recipe_hash
from pipeline.recipe.schema import Recipe
from pipeline.recipe.technique import Bounding
from pipeline.robustness.bounds import trace
from pipeline.training.context import RunContext

SIDE = 256
VERSIONS = ("torch", "deepspeed", "ffcv", "numpy")


class Unhealthy(RuntimeError):
    """A worker must not train; the message names its host and the problem."""


def check_device(device: torch.device) -> None:
    """Check a product of integer matrices, exact in fp32 in any summation order. Errors: Unhealthy."""
    host = platform.node()
    values = torch.arange(SIDE * SIDE, dtype=torch.float32).reshape(SIDE, SIDE) % 7
    try:
        product = (values.to(device) @ values.T.to(device)).cpu()
    except torch.OutOfMemoryError:
        raise  # something else uses the GPU, or did until a moment ago
    except RuntimeError as error:
        raise Unhealthy(f"{host}: {device} does not compute ({error}); exclude this node (slurm.exclude)") from error
    expected = (values.long() @ values.T.long()).float()
    if not torch.equal(product, expected):
        wrong = int((product != expected).sum())
        raise Unhealthy(
            f"{host}: {device} computes wrongly ({wrong} of {SIDE * SIDE} sums); exclude this node (slurm.exclude)"
        )


def check_bounds(recipe: Recipe) -> None:
    """Refuse a network that cannot be bounded if an objective trains or evaluates with bounds. Errors: ValueError."""
    objectives = recipe.objectives.items()
    bounding = [f"{key}.name {value.name}" for key, value in objectives if isinstance(value, Bounding)]
    if not bounding:
        return
    try:
        trace(build_network(recipe.model, recipe.seed, recipe.data.image_size))
    except ValueError as error:
        need = f"{bounding[0]} needs bounds of model.arch {recipe.model.arch}"
        raise ValueError(f"{need}: {error}; choose another network or objective") from None


def _identity(context: RunContext) -> dict[str, Any]:
    """Facts that must be equal on all workers."""
    return {
        "recipe": recipe_hash(context.recipe),
        **{key: manifest.sha256 for key, manifest in check_data_files(context.recipe).items()},
        **{name: metadata.version(name) for name in VERSIONS},
        "python": platform.python_version(),
        "device": context.group.device.type,
        "threads": torch.get_num_threads(),
    }


def check_worker(context: RunContext) -> None:
    """Raise Unhealthy on every rank if any worker's device fails or any worker differs from the others. Collective.

    Errors, on every rank: ValueError for a network that must be bounded and cannot be; DataError naming the host and
    file for data that is missing, damaged or does not fit the recipe.
    """
    check_bounds(context.recipe)
    device_error = data_error = None
    identity: dict[str, Any] = {}
    try:
        check_device(context.group.device)
        identity = _identity(context)
    except Unhealthy as error:
        device_error = str(error)
    except DataError as error:
        data_error = f"{platform.node()}: {error}"
    answers = context.group.gather((platform.node(), device_error, data_error, identity))
    if messages := {message for _, message, _, _ in answers if message}:
        raise Unhealthy("; ".join(sorted(messages)))
    if messages := {message for _, _, message, _ in answers if message}:
        raise DataError("; ".join(sorted(messages)))
    for key in identity:
        values = [other[key] for *_, other in answers]
        usual, count = Counter(values).most_common(1)[0]
        if count < len(values):
            others = sorted({f"{host} has {other[key]}" for host, *_, other in answers if other[key] != usual})
            raise Unhealthy(f"the workers differ in {key}: most have {usual}, {'; '.join(others)}")
