"""Training for randomized smoothing: losses and noise against reference code, and an attack in closed form."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Categorical, kl_divergence
from torch.nn import functional as F

from pipeline import rng
from pipeline.robustness.attacks import L2Ball
from pipeline.robustness.objectives import Objective, ObjectiveInput, ObjectiveOutput
from pipeline.robustness.objectives.smoothing import noise_training, smoothadv_training, stability_training

IMAGES, SHAPE, SIGMA = 12, (3, 5, 5), 0.25
PIXELS = math.prod(SHAPE)
X = torch.rand(IMAGES, *SHAPE, generator=torch.Generator().manual_seed(0))
Y = torch.arange(IMAGES) % 3
KEY_ARRAY = rng.sample_keys(np.arange(IMAGES), 0, "attack")
KEYS = torch.from_numpy(KEY_ARRAY.view(np.int64))


def gaussians(key_array: np.ndarray) -> Tensor:
    """Box and Muller over the uniforms of `pipeline.rng`, in float64: [n] -> [n, *SHAPE]."""
    uniforms = np.floor(rng.uniforms(key_array, PIXELS + PIXELS % 2) * 2.0**24) / 2.0**24  # 24 bits, as on the device
    first, second = np.split(uniforms, 2, axis=1)
    radius, angle = np.sqrt(-2 * np.log1p(-first)), 2 * np.pi * second
    both = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)], axis=1)[:, :PIXELS]
    return torch.from_numpy(both).view(-1, *SHAPE)


def draws_of_each(samples: int) -> Tensor:
    """The noise draws of SmoothAdv: [n, samples, *SHAPE]."""
    numbers = rng.mix64(np.arange(samples, dtype=np.uint64) * np.uint64(rng.GOLDEN_GAMMA) + np.uint64(1))
    derived = rng.mix64(KEY_ARRAY[:, None] ^ numbers)
    return gaussians(derived.ravel()).view(IMAGES, samples, *SHAPE)


class Recorder(nn.Module):
    """A network that records its inputs, separately for training and eval mode."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.crafted: list[Tensor] = []
        self.updates: list[Tensor] = []

    def forward(self, images: Tensor) -> Tensor:
        (self.updates if self.training else self.crafted).append(images.detach().clone())
        return self.network(images)


def small_network(classes: int = 3) -> Recorder:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        hidden, last = nn.Linear(PIXELS, 16), nn.Linear(16, classes)
    with torch.no_grad():
        last.weight.mul_(8)  # so that noise changes predictions
    return Recorder(nn.Sequential(nn.Flatten(), hidden, nn.Tanh(), last))


def run(objective: Objective, network: nn.Module, y: Tensor = Y) -> ObjectiveOutput:
    return objective(ObjectiveInput(network, network, X, y, KEYS))


def count(probabilities: Tensor, y: Tensor = Y) -> int:
    return sum(int(row.argmax()) == int(label) for row, label in zip(probabilities.detach(), y, strict=True))


def test_noise_training_is_cross_entropy_on_unclipped_noisy_images() -> None:
    network = small_network()
    outcome = run(noise_training(SIGMA), network)
    (inputs,) = network.updates
    torch.testing.assert_close(inputs.double(), X.double() + SIGMA * gaussians(KEY_ARRAY), rtol=0, atol=1e-5)
    assert float(inputs.min()) < -0.1
    assert float(inputs.max()) > 1.1
    probabilities = network.network(inputs).double().softmax(dim=1)
    expected = -probabilities[torch.arange(IMAGES), Y].log().mean()
    assert outcome.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert outcome.robust_correct is not None
    assert int(outcome.robust_correct) == count(probabilities)
    assert outcome.clean_correct is None
    assert not network.crafted


def test_stability_training_adds_the_divergence_of_noisy_predictions() -> None:
    network = small_network()
    outcome = run(stability_training(SIGMA, beta=3.0), network)
    clean_input, noisy_input = network.updates
    assert torch.equal(clean_input, X)
    torch.testing.assert_close(noisy_input.double(), X.double() + SIGMA * gaussians(KEY_ARRAY), rtol=0, atol=1e-5)
    clean, noisy = network.network(clean_input), network.network(noisy_input)
    divergence = kl_divergence(Categorical(logits=clean), Categorical(logits=noisy)).mean()
    expected = F.cross_entropy(clean, Y) + 3.0 * divergence
    assert divergence.item() > 0.03
    assert outcome.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert outcome.clean_correct is not None
    assert outcome.robust_correct is not None
    assert (int(outcome.clean_correct), int(outcome.robust_correct)) == (count(clean), count(noisy))
    # The gradient flows through both sides of the divergence.
    parameters = list(network.parameters())
    for grad, expected_grad in zip(
        torch.autograd.grad(outcome.loss, parameters), torch.autograd.grad(expected, parameters), strict=True
    ):
        torch.testing.assert_close(grad, expected_grad, rtol=1e-4, atol=1e-6)


def test_smoothadv_takes_one_step_up_the_averaged_probability() -> None:
    """d/dx of -log mean_j p_j is -sum_j grad p_j / sum_j p_j: one image and one noise draw at a time."""
    network, samples, step_size = small_network(), 4, 0.05
    outcome = run(smoothadv_training(L2Ball(1.0), 1, step_size, SIGMA, samples), network)
    noise = SIGMA * draws_of_each(samples).float()
    expected = torch.empty_like(X)
    for i in range(IMAGES):
        numerator, denominator = torch.zeros(SHAPE), 0.0
        for j in range(samples):
            image = X[i].clone().requires_grad_(True)
            p = network.network((image + noise[i, j])[None]).softmax(dim=1)[0, Y[i]]
            numerator -= torch.autograd.grad(p, image)[0]
            denominator += p.item()
        grad = numerator / denominator
        expected[i] = (X[i] + step_size * grad / grad.norm()).clip(0, 1)
    (crafted,), (inputs,) = network.crafted, network.updates
    start = crafted.view(IMAGES, samples, *SHAPE) - noise
    x_adv = inputs.view(IMAGES, samples, *SHAPE) - noise  # the same noise draws in the attack and in the update
    torch.testing.assert_close(start, X[:, None].expand_as(start), rtol=0, atol=1e-5)
    torch.testing.assert_close(x_adv, expected[:, None].expand_as(x_adv), rtol=0, atol=1e-4)
    assert float(inputs.min()) < -0.1
    assert float(inputs.max()) > 1.1

    logits = network.network(inputs).double().view(IMAGES, samples, -1)
    losses = [-logits[i, j].softmax(0)[Y[i]].log() for i in range(IMAGES) for j in range(samples)]
    assert outcome.loss.item() == pytest.approx(torch.stack(losses).mean().item(), rel=1e-5)
    assert outcome.robust_correct is not None
    assert int(outcome.robust_correct) == count(logits.softmax(dim=2).mean(dim=1))
    assert outcome.clean_correct is None


def test_smoothadv_finds_the_worst_point_of_the_ball_of_a_linear_network() -> None:
    """For any noise it is x - eps w / |w|, with the sign of w given by the label."""
    eps, samples = 0.2, 3
    weight = torch.randn(PIXELS, generator=torch.Generator().manual_seed(4))
    layer = nn.Linear(PIXELS, 2, bias=False)
    layer.weight = nn.Parameter(torch.stack([torch.zeros(PIXELS), weight]))
    network = Recorder(nn.Sequential(nn.Flatten(), layer))
    x = 0.25 + 0.5 * X  # the ball lies within [0, 1]
    labels = Y % 2
    objective = smoothadv_training(L2Ball(eps), 4, 0.1, SIGMA, samples)
    outcome = objective(ObjectiveInput(network, network, x, labels, KEYS))
    side = torch.where(labels == 1, 1.0, -1.0).double()
    noise = SIGMA * draws_of_each(samples)
    margins = (x.double()[:, None] + noise).flatten(2) @ weight.double() * side[:, None] - eps * weight.norm().double()
    assert outcome.loss.item() == pytest.approx(torch.log1p(torch.exp(-margins)).mean().item(), rel=1e-4)


def test_noise_draws_of_one_image_differ_and_do_not_depend_on_their_number() -> None:
    inputs = {}
    for samples in (1, 4):
        network = small_network()
        run(smoothadv_training(L2Ball(0.1), 1, 0.05, SIGMA, samples), network)
        inputs[samples] = network.crafted[0].view(IMAGES, samples, *SHAPE)
    torch.testing.assert_close(inputs[4][:, :1], inputs[1], rtol=0, atol=1e-6)
    assert len({row.sum().item() for row in inputs[4].flatten(0, 1)}) == 4 * IMAGES
