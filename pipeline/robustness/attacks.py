"""Adversarial examples: balls, projected gradient descent and the noise that it starts from.

Images are [n, ...] float32 in [0, 1] and eps is in pixels. Random numbers continue the streams of `pipeline.rng` on
the device: sample i's noise is a function of keys[i] alone, never of the batch that it is in.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pipeline.distributed import to_device
from pipeline.models.pruning.scores import cached_weights
from pipeline.recipe.objective import ThreatModel
from pipeline.rng import GOLDEN_GAMMA, MIX_1, MIX_2, sample_keys

TINY = torch.finfo(torch.float32).tiny


def device_keys(
    sample_ids: NDArray[np.int64], device: torch.device, seed: int, purpose: str, *scope: int | str
) -> Tensor:
    """`pipeline.rng.sample_keys` as the noise here takes them: [n] int64 with their bits, on a device."""
    return to_device(torch.from_numpy(sample_keys(sample_ids, seed, purpose, *scope).view(np.int64)), device)


def _signed(x: int) -> int:
    """The int64 that has the bits of a uint64; torch has no uint64 arithmetic, and products wrap alike."""
    return x - (1 << 64) if x >= 1 << 63 else x


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift of int64 taken as uint64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix64(x: Tensor) -> Tensor:
    x = (x ^ _shift_right(x, 30)) * _signed(MIX_1)
    x = (x ^ _shift_right(x, 27)) * _signed(MIX_2)
    return x ^ _shift_right(x, 31)


def _stream(keys: Tensor, count: int) -> Tensor:
    """The first `count` numbers of every key's SplitMix64 stream: [n] int64 -> [n, count] float32 in [0, 1)."""
    counters = torch.arange(1, count + 1, dtype=torch.int64, device=keys.device) * _signed(GOLDEN_GAMMA)
    bits = _mix64(keys[:, None] + counters)
    return _shift_right(bits, 40).to(torch.float32) * 2.0**-24


def uniform_noise(keys: Tensor, shape: Sequence[int]) -> Tensor:
    """Uniform numbers: keys [n] int64 (the uint64 of `pipeline.rng`, same bits) -> [n, *shape] float32 in [0, 1).

    The same bits on every device: the top 24 of the bits that `pipeline.rng.uniforms` takes 53 of.
    """
    return _stream(keys, math.prod(shape)).view(-1, *shape)


def _box_muller(uniforms: Tensor) -> Tensor:
    """Box and Muller (1958): [n, 2 m] in [0, 1) -> [n, 2 m] standard normal."""
    first, second = uniforms.chunk(2, dim=1)
    radius = (-2.0 * torch.log1p(-first)).sqrt()  # 1 - u lies in (0, 1], so that the logarithm is finite
    angle = 2.0 * math.pi * second
    return torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)


def gaussian_noise(keys: Tensor, shape: Sequence[int]) -> Tensor:
    """Standard normal numbers: keys [n] int64 -> [n, *shape] float32, equal across devices up to rounding."""
    count = math.prod(shape)
    return _box_muller(_stream(keys, count + count % 2))[:, :count].reshape(-1, *shape)


def derived_keys(keys: Tensor, numbers: Tensor) -> Tensor:
    """Streams for several independent draws per sample: keys [n] and numbers [m], both int64 -> [n, m] int64.

    Mixed as `pipeline.rng.sample_keys` mixes sample ids into a scope: a draw's stream neither depends on which other
    draws are made nor overlaps with theirs.
    """
    return _mix64(keys[:, None] ^ _mix64(numbers * _signed(GOLDEN_GAMMA) + 1))


def _per_sample(values: Tensor, like: Tensor) -> Tensor:
    return values.view(-1, *[1] * (like.dim() - 1))


def _unit(direction: Tensor) -> Tensor:
    """Each sample divided by its l2 norm; a zero sample stays zero."""
    # Dividing by the largest entry first keeps the squares of a confident network's tiny gradients from vanishing.
    flat = direction.flatten(1)
    flat = flat / flat.abs().amax(dim=1, keepdim=True).clamp_min(TINY)
    norm = torch.linalg.vector_norm(flat, dim=1, keepdim=True)
    return (flat / norm.clamp_min(TINY)).view_as(direction)


@dataclass(frozen=True)
class LinfBall:
    """|x_adv - x| <= eps in every pixel."""

    eps: float

    def random_start(self, x: Tensor, keys: Tensor) -> Tensor:
        """Uniform in the ball, then clipped to [0, 1]."""
        noise = uniform_noise(keys, x.shape[1:])
        return self.project(x + self.eps * (2.0 * noise - 1.0), x)

    def step(self, x_adv: Tensor, grad: Tensor, step_size: float) -> Tensor:
        """Steepest ascent for this norm: step_size times the sign of the gradient."""
        return x_adv + step_size * grad.sign()

    def confine(self, delta: Tensor) -> Tensor:
        """The nearest difference from an image that the ball allows, whatever the image."""
        return delta.clamp(-self.eps, self.eps)

    def project(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """The nearest point in the ball and in [0, 1]; [0, 1] holds exactly, eps up to one float32 rounding (6e-8)."""
        return torch.clamp(x_adv, x - self.eps, x + self.eps).clamp_(0.0, 1.0)


@dataclass(frozen=True)
class L2Ball:
    """The l2 norm of x_adv - x, over all pixels of an image, is at most eps."""

    eps: float

    def random_start(self, x: Tensor, keys: Tensor) -> Tensor:
        """Uniform in the ball: a uniform direction, and a radius eps * u^(1/d); then clipped to [0, 1]."""
        count = x[0].numel()
        uniforms = _stream(keys, count + count % 2 + 1)
        direction = _unit(_box_muller(uniforms[:, :-1])[:, :count].reshape(x.shape))
        radius = self.eps * uniforms[:, -1] ** (1.0 / count)
        return self.project(x + _per_sample(radius, x) * direction, x)

    def step(self, x_adv: Tensor, grad: Tensor, step_size: float) -> Tensor:
        """Steepest ascent for this norm: step_size along the gradient's direction."""
        return x_adv + step_size * _unit(grad)

    def confine(self, delta: Tensor) -> Tensor:
        """The nearest difference from an image that the ball allows, whatever the image."""
        norm = torch.linalg.vector_norm(delta.flatten(1), dim=1)
        scale = (self.eps / norm.clamp_min(TINY)).clamp_max(1.0)
        return _per_sample(scale, delta) * delta

    def project(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """Back into the ball, then into [0, 1], which only brings it nearer to x.

        [0, 1] holds exactly, eps up to float32 rounding (relative 1e-6).
        """
        return (x + self.confine(x_adv - x)).clamp_(0.0, 1.0)


Ball = LinfBall | L2Ball


def ball_of(threat_model: ThreatModel) -> Ball:
    """The ball that a recipe's threat model names."""
    eps = float(threat_model.eps)
    return LinfBall(eps) if threat_model.norm == "linf" else L2Ball(eps)


def pgd(
    forward: Callable[[Tensor], Tensor],
    x: Tensor,
    loss_of: Callable[[Tensor], Tensor],
    *,
    ball: Ball,
    steps: int,
    step_size: float,
    start: Tensor,
) -> Tensor:
    """Projected gradient ascent on the loss inside the ball around x (Madry et al., ICLR 2018, section 2.1).

    `forward` maps images [n, ...] to logits, `loss_of` maps logits to one loss per sample [n]. The gradient is that of
    the sum, so a sample's result does not depend on how many others are in the batch, and goes to the input only: no
    parameter's .grad is touched. One step from a random start is FGSM-RS (Wong et al., ICLR 2020, algorithm 3).
    Returns the last iterate, detached, in the ball and in [0, 1] as `ball.project` states.
    """
    x_adv = start.detach()
    for _ in range(steps):
        x_adv.requires_grad_(True)
        with torch.enable_grad():
            loss = loss_of(forward(x_adv)).sum()
        (grad,) = torch.autograd.grad(loss, x_adv)
        with torch.no_grad():
            x_adv = ball.project(ball.step(x_adv, grad, step_size), x)
    return x_adv.detach()


@contextmanager
def crafting(
    network: nn.Module, autocast: Callable[[], AbstractContextManager[object]] = nullcontext
) -> Iterator[None]:
    """Eval mode and weights computed once, for an attack on `network` whose forwards run under `autocast`.

    BatchNorm uses its running statistics and leaves them alone. Parameters are frozen: a compiled backward computes the
    gradients of all that require one, asked for or not. Every module's training flag and every requires_grad is put
    back as it was, also after an error.
    """
    training = [(module, module.training) for module in network.modules()]
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    network.eval()
    try:
        with cached_weights(network, autocast):
            for parameter in trained:
                parameter.requires_grad_(False)
            yield
    finally:
        for module, flag in training:
            module.training = flag
        for parameter in trained:
            parameter.requires_grad_(True)
