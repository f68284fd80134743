"""Average pooling to a fixed grid with a backward pass that is deterministic everywhere.

torch's own adaptive pooling refuses to run backward on a GPU under deterministic algorithms, but to one cell, where it
takes a mean.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F


def grid_average(features: Tensor, rows: int, columns: int) -> Tensor:
    """Adaptive average pooling, as two matrix products: [n, c, h, w] -> [n, c, rows, columns], larger or smaller.

    Features that have this size already come back as they are. Linear, with no negative coefficient.
    """
    height, width = features.shape[-2:]
    if (height, width) == (rows, columns):
        return features
    down = F.adaptive_avg_pool1d(torch.eye(height), rows).to(features)
    across = F.adaptive_avg_pool1d(torch.eye(width), columns).to(features)
    return down.T @ features @ across


# The size decides what is done, which symbolic tracing cannot follow; it sees one call of this function instead.
fx.wrap("grid_average")


class GridAverage(nn.Module):
    """`grid_average` as a layer; stands in for nn.AdaptiveAvgPool2d and has no state either."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.rows = rows
        self.columns = columns

    def forward(self, features: Tensor) -> Tensor:
        return grid_average(features, self.rows, self.columns)
