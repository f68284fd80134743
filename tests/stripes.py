"""Images of four kinds of stripes, and a small network that tells them apart: robust to some of the attacks on them."""

from __future__ import annotations

import math
from fractions import Fraction

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.recipe_objective import ThreatModel

SIDE, CLASSES = 10, 4
BALLS = {
    "linf": ThreatModel(norm="linf", eps=Fraction(7, 100)),
    "l2": ThreatModel(norm="l2", eps=Fraction(1, 2)),
}
"""In which the network is robust to some of the attacks."""


def draw(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images [count, 1, 10, 10] float32 in [0, 1] and their classes."""
    generator = torch.Generator().manual_seed(seed)
    angles = torch.arange(CLASSES) * math.pi / CLASSES
    rows, columns = torch.meshgrid(torch.arange(float(SIDE)), torch.arange(float(SIDE)), indexing="ij")
    waves = torch.sin(1.2 * (angles.cos()[:, None, None] * rows + angles.sin()[:, None, None] * columns))
    y = torch.randint(0, CLASSES, (count,), generator=generator)
    noise = torch.randn(count, SIDE, SIDE, generator=generator)
    return (0.5 + 0.12 * waves[y] + 0.12 * noise).clamp(0, 1)[:, None], y


def trained_network(steps: int = 25) -> nn.Module:
    """Two layers, some nine images of ten right; in eval mode."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Flatten(), nn.Linear(SIDE * SIDE, 32), nn.ReLU(), nn.Linear(32, CLASSES))
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    for step in range(steps):
        x, y = draw(128, seed=1 + step)
        optimizer.zero_grad()
        F.cross_entropy(network(x), y).backward()
        optimizer.step()
    network.zero_grad()
    return network.eval()
