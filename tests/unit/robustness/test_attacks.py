"""Attacks: balls, PGD against a reference loop, and PGD against an independent attack."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pyautoattack
import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline import rng
from pipeline.models import build_network
from pipeline.models.state import train_only
from pipeline.recipe.objective import ThreatModel
from pipeline.recipe.sections import Model
from pipeline.robustness import attacks
from pipeline.robustness.attacks import Ball, L2Ball, LinfBall, crafting, pgd

BALLS = [LinfBall(0.1), L2Ball(0.7)]


def keys_of(count: int, *scope: int | str) -> Tensor:
    return torch.from_numpy(rng.sample_keys(np.arange(count), 0, "attack", *scope).view(np.int64))


def cross_entropy(y: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda logits: F.cross_entropy(logits, y, reduction="none")


def distance(ball: Ball, x_adv: Tensor, x: Tensor) -> Tensor:
    delta = (x_adv.double() - x.double()).flatten(1)
    return delta.abs().amax(dim=1) if isinstance(ball, LinfBall) else delta.norm(dim=1)


def assert_inside(ball: Ball, x_adv: Tensor, x: Tensor) -> None:
    """[0, 1] exactly; eps up to one float32 rounding of x + eps or of the norm."""
    assert x_adv.dtype == torch.float32
    assert float(x_adv.min()) >= 0.0
    assert float(x_adv.max()) <= 1.0
    slack = 6e-8 if isinstance(ball, LinfBall) else 1e-6 * ball.eps + 1e-7
    assert float(distance(ball, x_adv, x).max()) <= ball.eps + slack


# --- balls -----------------------------------------------------------------------------------------------------------


def test_ball_of_a_threat_model() -> None:
    assert attacks.ball_of(ThreatModel.model_validate({"norm": "linf", "eps": "4/255"})) == LinfBall(4 / 255)
    assert attacks.ball_of(ThreatModel.model_validate({"norm": "l2", "eps": 0.5})) == L2Ball(0.5)


@given(st.integers(0, 2**32), st.floats(1e-3, 3.0), st.floats(0, 10), st.sampled_from([LinfBall, L2Ball]))
def test_projection_is_inside_and_keeps_what_is_inside(seed: int, eps: float, reach: float, kind: type) -> None:
    generator = torch.Generator().manual_seed(seed)
    ball = kind(eps)
    x = torch.rand(4, 3, 5, 5, generator=generator).round(decimals=1)  # includes exact 0 and 1
    far = x + reach * torch.randn(x.shape, generator=generator)
    projected = ball.project(far, x)
    assert_inside(ball, projected, x)
    torch.testing.assert_close(ball.project(projected, x), projected, rtol=0, atol=1e-6)
    assert torch.equal(ball.project(x, x), x)


@pytest.mark.parametrize("ball", BALLS, ids=lambda ball: type(ball).__name__)
def test_random_start_is_inside_and_repeats(ball: Ball) -> None:
    x = torch.rand(16, 3, 8, 8)
    start = ball.random_start(x, keys_of(16))
    assert_inside(ball, start, x)
    assert torch.equal(start, ball.random_start(x, keys_of(16)))
    assert float((start - ball.random_start(x, keys_of(16, 1))).abs().max()) > 0


def test_linf_random_start_is_uniform_in_the_ball() -> None:
    x = torch.full((20, 3, 8, 8), 0.5)
    delta = (LinfBall(0.2).random_start(x, keys_of(20)) - x).double().numpy().ravel()
    assert scipy.stats.kstest(delta, scipy.stats.uniform(-0.2, 0.4).cdf).pvalue > 1e-3


def test_l2_random_start_is_uniform_in_the_ball() -> None:
    x = torch.full((4000, 1, 1, 3), 0.5)
    delta = (L2Ball(0.4).random_start(x, keys_of(4000)) - x).double().flatten(1).numpy()
    radius = np.linalg.norm(delta, axis=1)
    assert scipy.stats.kstest((radius / 0.4) ** 3, "uniform").pvalue > 1e-3
    # On the sphere in three dimensions every coordinate is uniform (Archimedes).
    for axis in range(3):
        assert scipy.stats.kstest(delta[:, axis] / radius, scipy.stats.uniform(-1, 2).cdf).pvalue > 1e-3


def test_l2_step_has_its_length_for_tiny_and_zero_gradients() -> None:
    x = torch.full((3, 1, 4, 4), 0.5)
    grad = torch.randn(3, 1, 4, 4)
    grad[1] *= 1e-30  # its squares underflow to zero in float32
    grad[2] = 0.0
    delta = L2Ball(1.0).step(x, grad, 0.25) - x
    torch.testing.assert_close(delta.flatten(1).norm(dim=1), torch.tensor([0.25, 0.25, 0.0]), rtol=1e-5, atol=1e-6)


# --- PGD -------------------------------------------------------------------------------------------------------------


class Linear(nn.Module):
    """logits = <x, a> * (+1, -1): its gradient, and so its worst case, is known."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.direction = nn.Parameter(torch.randn(shape))

    def forward(self, x: Tensor) -> Tensor:
        margin = (x * self.direction).flatten(1).sum(dim=1)
        return torch.stack([margin, -margin], dim=1)


def test_fgsm_on_a_linear_model_is_the_closed_form() -> None:
    model, x, y = Linear((3, 4, 4)), torch.rand(6, 3, 4, 4), torch.tensor([0, 1] * 3)
    ball = LinfBall(0.1)
    start = ball.random_start(x, keys_of(6))
    x_adv = pgd(model, x, cross_entropy(y), ball=ball, steps=1, step_size=0.05, start=start)
    towards = (2.0 * y - 1.0).view(-1, 1, 1, 1) * model.direction.detach().sign()
    expected = (start + 0.05 * towards).clamp(x - 0.1, x + 0.1).clamp(0, 1)
    torch.testing.assert_close(x_adv, expected)


def test_linf_pgd_on_a_linear_model_reaches_the_optimum() -> None:
    model, x, y = Linear((3, 4, 4)), torch.rand(6, 3, 4, 4), torch.tensor([0, 1] * 3)
    ball = LinfBall(0.1)
    start = ball.random_start(x, keys_of(6))
    x_adv = pgd(model, x, cross_entropy(y), ball=ball, steps=5, step_size=0.05, start=start)
    towards = (2.0 * y - 1.0).view(-1, 1, 1, 1) * model.direction.detach().sign()
    torch.testing.assert_close(x_adv, (x + 0.1 * towards).clamp(0, 1))


def test_l2_pgd_on_a_linear_model_reaches_the_optimum() -> None:
    model, x, y = Linear((3, 4, 4)), torch.full((2, 3, 4, 4), 0.5), torch.tensor([0, 1])
    ball = L2Ball(0.4)  # small enough that clipping to [0, 1] has no effect
    start = ball.random_start(x, keys_of(2))
    x_adv = pgd(model, x, cross_entropy(y), ball=ball, steps=40, step_size=0.2, start=start)
    direction = model.direction.detach() / model.direction.detach().norm()
    towards = (2.0 * y - 1.0).view(-1, 1, 1, 1) * direction
    torch.testing.assert_close(x_adv, x + 0.4 * towards, rtol=0, atol=1e-4)


def pgd_reference(model: nn.Module, x: Tensor, y: Tensor, ball: Ball, steps: int, size: float, start: Tensor) -> Tensor:
    """The definition, in numpy and one image at a time."""
    results = []
    for i in range(len(x)):
        image, current = x[i].double().numpy(), start[i].double().numpy()
        for _ in range(steps):
            point = torch.tensor(current, dtype=torch.float32)[None].requires_grad_()
            F.cross_entropy(model(point), y[i : i + 1]).backward()
            assert point.grad is not None
            grad = point.grad[0].double().numpy()
            if isinstance(ball, LinfBall):
                delta = np.clip(current + size * np.sign(grad) - image, -ball.eps, ball.eps)
            else:
                delta = current + size * grad / np.linalg.norm(grad) - image
                delta *= min(1.0, ball.eps / np.linalg.norm(delta))
            current = np.clip(image + delta, 0.0, 1.0)
        results.append(torch.tensor(current, dtype=torch.float32))
    return torch.stack(results)


@pytest.mark.parametrize("ball", BALLS, ids=lambda ball: type(ball).__name__)
def test_pgd_equals_the_reference_loop(ball: Ball) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Softplus(), nn.Flatten(), nn.Linear(8 * 16, 5))
    x, y = torch.rand(5, 3, 6, 6), torch.tensor([0, 1, 2, 3, 4])
    start = ball.random_start(x, keys_of(5))
    x_adv = pgd(model, x, cross_entropy(y), ball=ball, steps=4, step_size=ball.eps / 3, start=start)
    torch.testing.assert_close(x_adv, pgd_reference(model, x, y, ball, 4, ball.eps / 3, start), rtol=0, atol=1e-5)
    assert_inside(ball, x_adv, x)
    assert not x_adv.requires_grad
    assert not start.requires_grad


@pytest.mark.parametrize("ball", BALLS, ids=lambda ball: type(ball).__name__)
def test_pgd_raises_the_loss_and_touches_no_parameter(ball: Ball) -> None:
    network = build_network(Model(arch="small_cnn", num_classes=10), 0)
    x, y = torch.rand(8, 3, 28, 28), torch.arange(8)
    loss_of = cross_entropy(y)
    start = ball.random_start(x, keys_of(8))
    with crafting(network):
        x_adv = pgd(network, x, loss_of, ball=ball, steps=3, step_size=ball.eps / 2, start=start)
        gained = loss_of(network(x_adv)) - loss_of(network(x))
    assert bool((gained > 0).all())
    assert all(parameter.grad is None for parameter in network.parameters())


@pytest.mark.parametrize("ball", BALLS, ids=lambda ball: type(ball).__name__)
def test_a_samples_attack_does_not_depend_on_its_batch(ball: Ball) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 20), nn.Softplus(), nn.Linear(20, 5)).double()
    x, y = torch.rand(6, 3, 4, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 4, 0])
    start = ball.random_start(x, keys_of(6)).double()

    def attack(rows: slice) -> Tensor:
        loss_of = cross_entropy(y[rows])
        return pgd(model, x[rows], loss_of, ball=ball, steps=5, step_size=ball.eps / 3, start=start[rows])

    alone = torch.cat([attack(slice(i, i + 1)) for i in range(6)])
    torch.testing.assert_close(attack(slice(0, 6)), alone)


def test_no_steps_give_the_start() -> None:
    x = torch.rand(2, 3, 4, 4)
    loss_of = cross_entropy(torch.zeros(2, dtype=torch.int64))
    x_adv = pgd(Linear((3, 4, 4)), x, loss_of, ball=LinfBall(0.1), steps=0, step_size=0.1, start=x)
    assert torch.equal(x_adv, x)


# --- crafting --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fails", [False, True])
def test_crafting_restores_every_training_flag(fails: bool) -> None:
    network = build_network(Model(arch="small_cnn", num_classes=10), 0)
    network.train()
    bn2 = network.get_submodule("backbone.bn2")
    bn2.eval()  # one module that differs from its parent
    train_only(network, "weights")
    flags = [module.training for module in network.modules()]
    statistics = {name: buffer.clone() for name, buffer in network.named_buffers()}

    class Broken(Exception):
        pass

    try:
        with crafting(network):
            assert not any(module.training for module in network.modules())
            network(torch.rand(4, 3, 28, 28))
            if fails:
                raise Broken
    except Broken:
        assert fails
    assert [module.training for module in network.modules()] == flags
    assert not bn2.training
    assert all(torch.equal(buffer, statistics[name]) for name, buffer in network.named_buffers())
    assert all(parameter.requires_grad for parameter in network.parameters())


# --- an independent attack -------------------------------------------------------------------------------------------


def train_on_stripes(test_images: int) -> tuple[nn.Module, Tensor, Tensor]:
    """A small network trained on four classes of noisy gratings, and test images."""
    torch.manual_seed(0)
    angles = torch.arange(4) * math.pi / 4
    grid = torch.stack(torch.meshgrid(torch.arange(10.0), torch.arange(10.0), indexing="ij"))
    waves = torch.sin(1.2 * (angles.cos()[:, None, None] * grid[0] + angles.sin()[:, None, None] * grid[1]))

    def draw(count: int) -> tuple[Tensor, Tensor]:
        y = torch.randint(0, 4, (count,))
        return (0.5 + 0.12 * waves[y] + 0.12 * torch.randn(count, 10, 10)).clamp(0, 1)[:, None], y

    model = nn.Sequential(nn.Flatten(), nn.Linear(100, 32), nn.ReLU(), nn.Linear(32, 4))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(100):
        x, y = draw(128)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model.eval(), *draw(test_images)


def test_pgd_is_about_as_strong_as_apgd() -> None:
    model, x, y = train_on_stripes(100)
    ball = LinfBall(0.07)
    start = ball.random_start(x, keys_of(100))
    ours = pgd(model, x, cross_entropy(y), ball=ball, steps=40, step_size=0.015, start=start)
    oracle = pyautoattack.AutoAttack(
        model, norm="Linf", eps=0.07, version="custom", attacks=["apgd-ce"], device="cpu", seed=0
    )
    theirs, _ = oracle.run_standard_evaluation(x, y, batch_size=100)

    def accuracy(images: Tensor) -> float:
        with torch.no_grad():
            return float((model(images).argmax(dim=1) == y).float().mean())

    assert accuracy(x) > 0.9
    assert 0.1 < accuracy(theirs) < 0.8, "the yardstick must neither fail nor break everything"
    assert accuracy(ours) <= accuracy(theirs) + 0.03
