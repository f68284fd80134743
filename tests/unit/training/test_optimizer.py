"""The optimizers of a phase, and the state of theirs that checkpoints hold."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pipeline.recipe.phase import Phase
from pipeline.training.engine import build_optimizer, slots_of


@pytest.mark.parametrize(("name", "decays_at_once"), [("adam", False), ("adamw", True)])
def test_only_the_weight_decay_of_adamw_is_decoupled(name: str, decays_at_once: bool) -> None:
    """Without a gradient, decoupled decay shrinks the weight by lr * decay; as part of the gradient it is rescaled."""
    phase = Phase.model_validate({"epochs": 1, "lr": 0.1, "optimizer": name, "weight_decay": 0.5})
    weight = nn.Parameter(torch.ones(3))
    weight.grad = torch.zeros(3)
    optimizer = build_optimizer({"weight": weight}, phase)
    optimizer.step()
    assert (weight[0].item() == pytest.approx(1 - 0.1 * 0.5)) == decays_at_once
    assert {*slots_of(phase), "step"} == set(optimizer.state[weight])


@pytest.mark.parametrize(("momentum", "slots"), [(0.9, ("momentum_buffer",)), (0.0, ())])
def test_sgd_has_a_buffer_if_it_has_momentum(momentum: float, slots: tuple[str, ...]) -> None:
    assert slots_of(Phase(epochs=1, lr=0.1, momentum=momentum)) == slots
