"""BatchNorm's running statistics, combined over all micro-batches of a step, the same on every rank.

Within a step the running statistics do not change, so the attacks of all micro-batches see the same ones. The batch
means and (unbiased) variances of each training forward are recorded; after the last backward those of all ranks are
gathered in micro-batch order, averaged in float32 and folded in once: r <- (1 - m) r + m * mean(batch statistics). The
result does not depend on which rank computed which micro-batch. The step's sums are in the same collective.

All layers are read and written at once: a network has many small ones, and a kernel launch per layer is slow.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from pipeline.distributed import Group

batched: Any = torch
"""torch, for its multi-tensor functions, which its stubs leave out."""


class BatchStatistics:
    """Manages the running statistics of every BatchNorm in training mode of a network, while a phase trains."""

    def __init__(self, network: nn.Module, group: Group) -> None:
        self._group = group
        layers = [m for m in network.modules() if isinstance(m, _BatchNorm) and m.training]
        self._layers = [layer for layer in layers if layer.track_running_stats]
        self._momenta: list[float] = []
        self._live: list[torch.Tensor] = []
        """Each layer's running mean and variance. Through .data: autograd saves the buffers of a training forward and
        would refuse in-place changes, although its backward does not read them."""
        self._counts: list[torch.Tensor] = []
        for layer in self._layers:
            if layer.momentum is None:
                raise ValueError("BatchNorm with momentum=None (cumulative average) is not supported; give it a number")
            assert layer.running_mean is not None
            assert layer.running_var is not None
            assert layer.num_batches_tracked is not None
            self._momenta.append(layer.momentum)
            self._live += [layer.running_mean.data, layer.running_var.data]
            self._counts.append(layer.num_batches_tracked)
            layer.momentum = 1.0  # a training forward then leaves exactly its batch statistics in the buffers
        self._sizes = [tensor.numel() for tensor in self._live]
        self._running = [tensor.clone() for tensor in self._live]
        self._recorded: list[torch.Tensor] = []
        self._recording, self._forwards = True, 0
        self._hook = network.register_forward_hook(self._record)

    def _record(self, *_: Any) -> None:
        if self._layers and self._layers[0].training:
            self._forwards += 1
            if self._recording:
                self._recorded.append(torch.cat(self._live))
            batched._foreach_copy_(self._live, self._running)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Training forwards normalise by their batch as ever, and their statistics are not folded in."""
        self._recording = False
        try:
            yield
        finally:
            self._recording = True

    @torch.no_grad()
    def fold_in(self, sums: torch.Tensor) -> torch.Tensor:
        """After a step's last backward: update the running statistics, and sum `sums` [m] float64 over the ranks.

        One collective for both. Every rank must have run equally many forwards. Returns the sums, bitwise equal on
        every rank.
        """
        own = torch.cat([sums.view(torch.float32), *self._recorded])  # float64 bits first, for alignment
        from_all = self._group.gather_rows(own[None])
        bits, statistics = from_all.split([2 * len(sums), len(own) - 2 * len(sums)], dim=1)
        if self._layers:
            self._fold(statistics.reshape(self._group.world * len(self._recorded), -1).mean(dim=0))
        return bits.contiguous().view(torch.float64).sum(dim=0)

    def _fold(self, mean: torch.Tensor) -> None:
        momenta = [momentum for momentum in self._momenta for _ in ("mean", "variance")]
        batches = batched._foreach_mul(mean.split(self._sizes), momenta)
        batched._foreach_mul_(self._running, [1.0 - momentum for momentum in momenta])
        batched._foreach_add_(self._running, batches)
        batched._foreach_copy_(self._live, self._running)
        batched._foreach_sub_(self._counts, self._forwards - 1)  # counts steps, not this rank's forwards
        self._recorded.clear()
        self._forwards = 0

    def close(self) -> None:
        for layer, momentum in zip(self._layers, self._momenta, strict=True):
            layer.momentum = momentum
        self._hook.remove()
