"""What every worker checks before its first step: its device, its data files, and that its peers are its likes.

A node with a broken GPU, another version of the code or another copy of the data is named, instead of spoiling a run.
And a network that no stage could bound is, before another stage has trained it.
"""

from __future__ import annotations

import platform
from collections import Counter
from importlib import metadata
from typing import Any

import torch

from pipeline.data.manifest import DataError, open_checked
from pipeline.models import build_network
from pipeline.recipe.file import recipe_hash
from pipeline.recipe.schema import Recipe
from pipeline.recipe.technique import Bounding
from pipeline.robustness.bounds import trace
from pipeline.training.context import RunContext

SIDE = 256
VERSIONS = ("torch", "deepspeed", "ffcv", "numpy")


class Unhealthy(RuntimeError):
    """A worker that must not train; the message names its host and what is wrong."""


def check_device(device: torch.device) -> None:
    """A product of integers, exact in fp32 in every order of summation. Errors: Unhealthy."""
    host = platform.node()
    values = torch.arange(SIDE * SIDE, dtype=torch.float32).reshape(SIDE, SIDE) % 7
    try:
        found = (values.to(device) @ values.T.to(device)).cpu()
    except RuntimeError as error:
        raise Unhealthy(f"{host}: {device} does not compute ({error}); exclude this node (slurm.exclude)") from error
    expected = (values.long() @ values.T.long()).float()
    if not torch.equal(found, expected):
        wrong = int((found != expected).sum())
        raise Unhealthy(
            f"{host}: {device} computes wrongly ({wrong} of {SIDE * SIDE} sums); exclude this node (slurm.exclude)"
        )


def check_bounds(recipe: Recipe) -> None:
    """Refuse a network without bounds where an objective trains or judges by them. Errors: ValueError."""
    proving = [f"{key}.name {found.name}" for key, found in recipe.objectives.items() if isinstance(found, Bounding)]
    if not proving:
        return
    try:
        trace(build_network(recipe.model, recipe.seed, recipe.data.image_size))
    except ValueError as error:
        raise ValueError(
            f"{proving[0]} needs bounds of model.arch {recipe.model.arch}: {error}; choose another network or objective"
        ) from None


def _identity(context: RunContext) -> dict[str, Any]:
    """What must be equal on all workers."""
    data = context.recipe.data
    return {
        "recipe": recipe_hash(context.recipe),
        "data.train_file": open_checked(data.train_file).sha256,
        "data.test_file": open_checked(data.test_file).sha256,
        **{name: metadata.version(name) for name in VERSIONS},
        "python": platform.python_version(),
        "device": context.group.device.type,
        "threads": torch.get_num_threads(),
    }


def check_worker(context: RunContext) -> None:
    """Raise Unhealthy on every rank if any worker's device fails or differs from the others. Collective.

    Errors: ValueError, on every rank as well, for a network that cannot be bounded and has to be; DataError naming
    the host and the file for data that is not there or not whole.
    """
    check_bounds(context.recipe)
    problem = refusal = None
    identity: dict[str, Any] = {}
    try:
        check_device(context.group.device)
        identity = _identity(context)
    except Unhealthy as error:
        problem = str(error)
    except DataError as error:
        refusal = f"{platform.node()}: {error}"
    answers = context.group.gather((platform.node(), problem, refusal, identity))
    if problems := {said for _, said, _, _ in answers if said}:
        raise Unhealthy("; ".join(sorted(problems)))
    if refusals := {said for _, _, said, _ in answers if said}:
        raise DataError("; ".join(sorted(refusals)))
    for key in identity:
        values = [other[key] for *_, other in answers]
        usual, count = Counter(values).most_common(1)[0]
        if count < len(values):
            odd = sorted({f"{host} has {other[key]}" for host, *_, other in answers if other[key] != usual})
            raise Unhealthy(f"the workers differ in {key}: most have {usual}, {'; '.join(odd)}")
