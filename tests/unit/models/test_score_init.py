"""Initial scores: the scaled formula, and draws that depend on seed, layer and position alone."""

from __future__ import annotations

from decimal import Decimal
from typing import get_args

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor, nn

from pipeline.models import build_network
from pipeline.models.pruning import score_init
from pipeline.models.pruning.scores import Scores, maskable
from pipeline.models.state import effective_state
from pipeline.recipe.sections import Model
from pipeline.recipe.sparsity import ScoreInit
from pipeline.rng import sample_keys, uniforms

CONVOLUTION = torch.empty(40, 30, 3, 3)


@pytest.mark.parametrize(
    ("layer", "fan_in"),
    [(nn.Linear(7, 3), 7), (nn.Conv2d(4, 6, (3, 5)), 60), (nn.Conv2d(4, 6, 3, groups=2), 18)],
)
def test_scaled_scores_are_the_formula(layer: nn.Linear | nn.Conv2d, fan_in: int) -> None:
    weight = layer.weight.detach().numpy().astype(np.float64)
    expected = np.sqrt(6 / fan_in) * weight / np.abs(weight).max()
    np.testing.assert_allclose(score_init.scaled("x", layer.weight).numpy(), expected, rtol=1e-6)


def test_random_scores_are_a_function_of_seed_layer_and_position() -> None:
    first = score_init.random_scores("random", 3)
    score = first("a.weight", CONVOLUTION)
    for output, kernel in enumerate(score.flatten(1)):
        stream = uniforms(sample_keys(np.array([output]), 3, "score", "random", "a.weight"), kernel.numel())[0]
        assert np.array_equal(kernel.numpy(), (2 * stream - 1).astype(np.float32))
    assert torch.equal(first("a.weight", CONVOLUTION.to(memory_format=torch.channels_last)), score)
    assert torch.equal(first("a.weight", CONVOLUTION.double()), score.double())
    for other in (first("b.weight", CONVOLUTION), score_init.random_scores("random", 4)("a.weight", CONVOLUTION)):
        assert abs(np.corrcoef(score.flatten(), other.flatten())[0, 1]) < 4 / np.sqrt(score.numel())
    assert scipy.stats.kstest(score.abs().flatten().numpy(), "uniform").pvalue > 1e-3


@pytest.mark.parametrize("layer", [nn.Conv2d(30, 200, 3), nn.Conv2d(60, 200, 3, groups=2), nn.Linear(300, 90)])
@pytest.mark.parametrize("kind", [kind for kind in get_args(ScoreInit) if kind != "scaled"])
def test_random_scores_have_the_distribution_of_torchs_initialisers(kind: str, layer: nn.Conv2d | nn.Linear) -> None:
    weight = layer.weight.detach()
    score = score_init.random_scores(kind, 0)("a.weight", weight).flatten()
    gain = {"gain": nn.init.calculate_gain("relu")} if kind.startswith("xavier") else {}
    torch.manual_seed(0)
    theirs = getattr(nn.init, f"{kind}_")(torch.empty_like(weight), **gain).flatten()
    assert scipy.stats.kstest(score.numpy(), theirs.numpy()).pvalue > 1e-3
    assert float(score.std()) == pytest.approx(float(theirs.std()), rel=0.02)
    if kind.endswith("uniform"):
        assert float(score.abs().max()) == pytest.approx(float(theirs.abs().max()), rel=1e-3)
    neighbours = np.corrcoef(score[:-1], score[1:])[0, 1]
    assert abs(neighbours) < 4 / np.sqrt(len(score))


def test_drawing_in_blocks_gives_the_same_scores_as_drawing_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = score_init.random_scores("random", 0)("a.weight", CONVOLUTION)
    monkeypatch.setattr(score_init, "BLOCK", 1000)  # 3 of 40 outputs
    assert torch.equal(score_init.random_scores("random", 0)("a.weight", CONVOLUTION), expected)


def random_masks(seed: int, keep: str) -> dict[str, Tensor]:
    network = build_network(Model(arch="small_cnn", num_classes=10), 0)
    Scores.attach(network, Decimal(keep), "global", score_init.random_scores("random", seed))
    state = effective_state(network)
    return {name: state[name] != 0 for name in maskable(network)}


def test_random_scores_keep_every_connection_with_equal_probability() -> None:
    denser, other, sparser = random_masks(0, "0.1"), random_masks(1, "0.1"), random_masks(0, "0.01")
    for name, mask in denser.items():
        n = mask.numel()
        assert abs(int(mask.sum()) - 0.1 * n) < 4 * np.sqrt(0.09 * n), name
        both = int((mask & other[name]).sum())
        assert abs(both - 0.01 * n) < 4 * np.sqrt(0.01 * n) + 1, f"{name}: two seeds draw apart"
        assert not bool((sparser[name] & ~mask).any()), "a sparser network is a part of a denser one"
