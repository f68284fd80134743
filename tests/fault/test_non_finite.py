"""A loss or a gradient that is not finite never enters a checkpoint, is tried once more, and then stops the run."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from pipeline.data.loading.loader import Batch
from pipeline.distributed import Group
from pipeline.recipe.schema import Recipe
from pipeline.robustness.objectives import ObjectiveInput, ObjectiveOutput
from pipeline.run import checkpoint
from pipeline.training.non_finite import NonFinite
from tests.bench.real_step import RealStep, recipe_of
from tests.fault.final_state import unlike
from tests.fault.poison import poisoned_samples, set_doses
from tests.support.commands import ROOT
from tests.support.processes import run_group
from tests.support.small_recipe import two_worker_recipe
from tests.support.undisturbed_run import new_run

PRUNE = "keep-0.1/prune"


def _do(folder: Path, *module: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HYDRA_TEST_RUN": str(folder)}
    command = [sys.executable, "-m", *module]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400, check=False)


@pytest.mark.timeout(1200)
def test_once_is_mended_and_always_stops_the_run(
    fashion_data: Path, tmp_path: Path, undisturbed: Callable[[Recipe], Path]
) -> None:
    """A worker of two computes nonsense: once during pretraining, and twice at the same step of pruning."""
    recipe = two_worker_recipe(fashion_data)
    folder = new_run(tmp_path / "run", recipe)
    set_doses(folder, [("pretrain", 13, 1), (PRUNE, 12, 2)])
    done = _do(folder, "tests.fault.run_observed", str(folder), "tests.fault.poison:spoil")
    assert done.returncode == 1, done.stderr[-3000:]
    (once,), (first, second) = poisoned_samples(folder, "pretrain"), poisoned_samples(folder, PRUNE)
    assert first == second
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, done.stderr[-3000:]
    for part in (f"{PRUNE} failed twice in the same way at step 12", "NonFinite", str(first), "lower phases.prune.lr"):
        assert part in errors[0]
    assert "Traceback" not in done.stderr
    restarts = (folder / "logs" / "restarts.log").read_text()
    assert f"the loss of step 13 is not finite: nan for samples {once}" in restarts
    newest = checkpoint.read_newest_checkpoint(folder / PRUNE)
    assert newest is not None
    assert newest.progress.step == 9
    for name, tensor in {**newest.model, **newest.train_state}.items():
        assert bool(torch.isfinite(tensor).all()), name

    resumed = _do(folder, "launch", "resume", str(folder))  # on another machine, say
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert unlike(recipe, undisturbed(recipe), folder) == []


class _Infinite(torch.autograd.Function):
    """The identity, whose gradient overflows."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return gradients[0] * math.inf


def _spoiled_step(group: Group) -> str:
    """The error of a step with a finite loss on every rank and a non-finite gradient on rank 1."""

    def objective(inputs: ObjectiveInput) -> ObjectiveOutput:
        loss = inputs.forward(inputs.x).float().logsumexp(dim=1).mean()
        return ObjectiveOutput(_Infinite.apply(loss) if group.rank == 1 else loss, None, None)  # pyright: ignore[reportArgumentType]

    ids = torch.arange(4) + 100 * group.rank
    batch = Batch(torch.randint(256, (4, 3, 28, 28), dtype=torch.uint8), torch.arange(4), ids)
    with mock.patch("tests.bench.real_step.build_objective", return_value=objective):
        step = RealStep(recipe_of("small_cnn", "clean", 4, 2, "fp32"), group, batch, "weights")
    with pytest.raises(NonFinite) as error:
        step()
    return str(error.value)


def test_a_gradient_is_named_by_its_own_step() -> None:
    for rank, message in enumerate(run_group(2, _spoiled_step)):
        ids = [i + 100 * rank for i in range(4)]
        assert "a gradient of step 0 is not finite" in message
        assert str(ids) in message
        assert "lower phases.pretrain.lr" in message
