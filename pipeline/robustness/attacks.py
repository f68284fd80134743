"""Adversarial attacks: perturbation balls, projected gradient descent (PGD), and the network's mode during an attack.

Images are [n, ...] float32 in [0, 1] and eps is in pixel units. Random starts are keyed (`pipeline.robustness.noise`):
that of sample i depends on keys[i] alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pipeline.models.pruning.masked_weight import cached_weights
from pipeline.recipe.threat_model import ThreatModel
from pipeline.robustness.noise import box_muller, uniform_noise, uniform_stream

TINY = torch.finfo(torch.float32).tiny


def _per_sample(values: Tensor, like: Tensor) -> Tensor:
    return values.view(-1, *[1] * (like.dim() - 1))


def _unit(direction: Tensor) -> Tensor:
    """Each sample divided by its l2 norm; zero stays zero."""
    # Dividing by the largest entry first avoids underflow: the gradients of a confident network are tiny.
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
        """Project a perturbation onto the ball, without clipping to [0, 1]."""
        return delta.clamp(-self.eps, self.eps)

    def project(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """The nearest point in the ball and in [0, 1]: [0, 1] exactly, eps up to one float32 rounding (6e-8)."""
        return torch.clamp(x_adv, x - self.eps, x + self.eps).clamp_(0.0, 1.0)


@dataclass(frozen=True)
class L2Ball:
    """The l2 norm of x_adv - x, over all pixels of an image, is at most eps."""

    eps: float

    def random_start(self, x: Tensor, keys: Tensor) -> Tensor:
        """Uniform in the ball (uniform direction, radius eps * u^(1/d)), then clipped to [0, 1]."""
        count = x[0].numel()
        uniforms = uniform_stream(keys, count + count % 2 + 1)
        direction = _unit(box_muller(uniforms[:, :-1])[:, :count].reshape(x.shape))
        radius = self.eps * uniforms[:, -1] ** (1.0 / count)
        return self.project(x + _per_sample(radius, x) * direction, x)

    def step(self, x_adv: Tensor, grad: Tensor, step_size: float) -> Tensor:
        """Steepest ascent for this norm: step_size along the gradient's direction."""
        return x_adv + step_size * _unit(grad)

    def confine(self, delta: Tensor) -> Tensor:
        """Project a perturbation onto the ball, without clipping to [0, 1]."""
        norm = torch.linalg.vector_norm(delta.flatten(1), dim=1)
        scale = (self.eps / norm.clamp_min(TINY)).clamp_max(1.0)
        return _per_sample(scale, delta) * delta

    def project(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """Project onto the ball, then clip to [0, 1], which does not leave the ball.

        [0, 1] holds exactly, eps up to float32 rounding (relative 1e-6).
        """
        return (x + self.confine(x_adv - x)).clamp_(0.0, 1.0)


Ball = LinfBall | L2Ball


def ball_of(threat_model: ThreatModel) -> Ball:
    """The ball of a recipe's threat model."""
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

    `forward` maps images [n, ...] to logits, `loss_of` maps logits to one loss per sample [n]. Losses are summed, so a
    sample's result does not depend on the batch size; the gradient is taken with respect to the input only, and no
    parameter's .grad changes. One step from a random start is FGSM-RS (Wong et al., ICLR 2020, algorithm 3).
    Returns the last iterate, detached, in the ball and in [0, 1] to the precision of `ball.project`.
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
    """Eval mode and cached masked weights, for an attack on `network` whose forwards run under `autocast`.

    BatchNorm uses its running statistics and does not update them. Parameters are frozen, because a compiled backward
    computes the gradients of all parameters that require one. On exit, also after an error, every module's training
    flag and every requires_grad is restored.
    """
    training = [(module, module.training) for module in network.modules()]
    trainable = [parameter for parameter in network.parameters() if parameter.requires_grad]
    network.eval()
    try:
        with cached_weights(network, autocast):
            for parameter in trainable:
                parameter.requires_grad_(False)
            yield
    finally:
        for module, flag in training:
            module.training = flag
        for parameter in trainable:
            parameter.requires_grad_(True)
