"""Average pooling to a fixed grid, with a deterministic backward pass on every device.

Under deterministic algorithms, torch's adaptive pooling has no backward on a GPU, except to one cell, where it is a
mean.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F


def grid_average(features: Tensor, rows: int, columns: int) -> Tensor:
    """Adaptive average pooling as two matrix products: [n, c, h, w] -> [n, c, rows, columns], larger or smaller.

    Linear, with non-negative coefficients. Features that already have the size are returned unchanged.
    """
    height, width = features.shape[-2:]
    if (height, width) == (rows, columns):
        return features
    down = F.adaptive_avg_pool1d(torch.eye(height), rows).to(features)
    across = F.adaptive_avg_pool1d(torch.eye(width), columns).to(features)
    return down.T @ features @ across


# The branch on the size cannot be traced symbolically; wrapped, the function is one node of the trace.
fx.wrap("grid_average")


class GridAverage(nn.Module):
    """`grid_average` as a layer: a stateless replacement for nn.AdaptiveAvgPool2d."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.rows = rows
        self.columns = columns

    def forward(self, features: Tensor) -> Tensor:
        return grid_average(features, self.rows, self.columns)
