"""The moving average of a stage: its horizon is in epochs, of as many steps as the stage has."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pipeline.distributed import Group
from pipeline.models.pruning.scores import Scores
from pipeline.recipe.stages import stages_of
from pipeline.training import stage as training_stage
from pipeline.training.context import RunContext
from tests.support.small_recipe import small_recipe

STEPS_PER_EPOCH = 20


class Built(Exception):
    """The average is about to be built."""


@pytest.mark.parametrize(("objective", "steps_per_epoch"), [("pgd", STEPS_PER_EPOCH), ("free", 3 * STEPS_PER_EPOCH)])
def test_the_horizon_is_in_epochs_replays_included(
    objective: str, steps_per_epoch: int, fashion_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {"name": objective} | ({"replays": 3, "overfitting_guard": None} if objective == "free" else {})
    pretrain: dict[str, Any] = {"epochs": 2, "lr": 0.05, "ema_epochs": 0.75}
    recipe = small_recipe(fashion_data, objective=values, phases={"pretrain": pretrain})

    def average(network: nn.Module, decay: float, scores: Scores | None) -> None:
        raise Built(decay)

    class NoEngine:
        def __init__(self, *_: Any) -> None: ...

        def close(self) -> None: ...

    monkeypatch.setattr(training_stage, "Ema", average)
    monkeypatch.setattr(training_stage, "Engine", NoEngine)
    context = RunContext(recipe, tmp_path, "token", Group(0, 1, torch.device("cpu")))
    with pytest.raises(Built) as built:
        training_stage.StageTrainer(context, stages_of(recipe)[0], tracker=None).restore(None)
    context.close()
    assert built.value.args == (pytest.approx(math.exp(-1 / (0.75 * steps_per_epoch))),)
