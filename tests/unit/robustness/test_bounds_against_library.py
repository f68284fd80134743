"""Margins agree with those of an independent library, bound-propagation (Mathiesen).

It supports linear layers, ReLU and sums of branches. Convolutions and the difference of logits are passed as matrices.
"""

from __future__ import annotations

from collections.abc import Iterator
from decimal import Decimal
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pipeline.models.architectures.verified_cnn import cnn_large, cnn_small
from pipeline.models.pruning.scores import Scores
from pipeline.robustness.bounds import linf_box
from tests.unit.robustness.test_bounds import CLASSES, all_margins, dense_form, image

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
SETTINGS = {"ibp": ("ibp", True), "crown_ibp": ("crown_ibp", True), "parallel": ("crown_ibp", False)}
"""Our method -> the library's, and whether the lower line of a ReLU is adaptive (CROWN) or parallel to the chord."""


def theirs(network: nn.Module, low: Tensor, high: Tensor) -> dict[str, Tensor]:
    """The library's lower bounds of a network of supported layers over one box: low and high [n]."""
    from bound_propagation import BoundModelFactory, HyperRectangle

    region = HyperRectangle(low[None], high[None])
    bounds: dict[str, Any] = {}
    for kind, (method, adaptive) in SETTINGS.items():
        bounded = BoundModelFactory(adaptive_relu=adaptive).build(network)
        bounds[kind] = getattr(bounded, method)(region).concretize().lower[0]
    return bounds


def linear(weight: np.ndarray, bias: np.ndarray) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(weight))
        layer.bias.copy_(torch.from_numpy(bias))
    return layer


def differences(y: int) -> np.ndarray:
    return np.eye(CLASSES)[y] - np.eye(CLASSES)


def assert_agree(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for kind in SETTINGS:
        actual = ours[kind][0].double()
        torch.testing.assert_close(
            actual, expected[kind], rtol=1e-4, atol=1e-4, msg=lambda m, kind=kind: f"{kind}: {m}"
        )
    assert not torch.allclose(expected["ibp"], expected["crown_ibp"], rtol=1e-2), (
        "the methods must differ on this network"
    )


def as_their_layers(network: nn.Sequential, y: int, shape: torch.Size) -> nn.Sequential:
    forms = dense_form(network, shape)
    forms[-1] = (differences(y) @ forms[-1][0], differences(y) @ forms[-1][1])

    def layers() -> Iterator[nn.Module]:
        for weight, bias in forms[:-1]:
            yield linear(weight, bias)
            yield nn.ReLU()
        yield linear(*forms[-1])

    return nn.Sequential(*layers())


@torch.no_grad()
@pytest.mark.parametrize("eps", [0.02, 0.2])
@pytest.mark.parametrize("keep", [None, "0.3"])
@pytest.mark.parametrize("build", [cnn_small, cnn_large])
def test_the_shipped_cnns_dense_and_masked(build: Any, keep: str | None, eps: float) -> None:
    torch.manual_seed(0)
    network, x, y = build(CLASSES, 8), image(), 2
    if keep is not None:
        Scores.attach(network, Decimal(keep))
    low, high = (bound.flatten().double() for bound in linf_box(x, eps))
    assert_agree(
        all_margins(network, x, torch.tensor([y]), eps), theirs(as_their_layers(network, y, x.shape[1:]), low, high)
    )


@torch.no_grad()
@pytest.mark.parametrize("seed", range(3))
def test_a_sum_of_branches(seed: int) -> None:
    from bound_propagation import Residual

    torch.manual_seed(seed)
    branch = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 8))
    last = nn.Linear(8, CLASSES)
    trunk = [nn.Linear(12, 8), nn.ReLU(), Residual(branch), nn.ReLU()]
    x, y, eps = torch.rand(1, 12), 1, 0.1
    merged = linear(differences(y) @ last.weight.double().numpy(), differences(y) @ last.bias.double().numpy())
    ours = all_margins(nn.Sequential(*trunk, last), x, torch.tensor([y]), eps)
    low, high = (bound[0].double() for bound in linf_box(x, eps))
    assert_agree(ours, theirs(nn.Sequential(*trunk, merged).double(), low, high))
