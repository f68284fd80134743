"""BatchNorm's running statistics, combined over all micro-batches of a step, the same on every rank.

Within a step the running statistics stand still, so an attack sees the same ones whichever micro-batch it is for. Each
training forward's batch mean and (unbiased) variance are caught by a hook; after the last backward those of all ranks
are gathered in micro-batch order, averaged in float32 and folded in once: r <- (1 - m) r + m * mean(batch statistics).
Who computed which micro-batch does not matter. The step's own sums travel in the same collective.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from pipeline.group import Group


class BatchStatistics:
    """Owns the running statistics of every BatchNorm of a network that is in training mode, while a phase trains."""

    def __init__(self, network: nn.Module, group: Group) -> None:
        self._group = group
        layers = [m for m in network.modules() if isinstance(m, _BatchNorm) and m.training]
        self._layers = [layer for layer in layers if layer.track_running_stats]
        self._momenta: list[float] = []
        self._caught: list[list[torch.Tensor]] = [[] for _ in self._layers]
        self._running = [self._read(m) for m in self._layers]
        self._hooks = []
        for index, layer in enumerate(self._layers):
            if layer.momentum is None:
                raise ValueError("BatchNorm with momentum=None (cumulative average) is not supported; give it a number")
            self._momenta.append(layer.momentum)
            layer.momentum = 1.0  # a training forward then leaves exactly its batch statistics in the buffers
            self._hooks.append(layer.register_forward_hook(self._catch(index)))

    @staticmethod
    def _read(layer: _BatchNorm) -> torch.Tensor:
        assert layer.running_mean is not None
        assert layer.running_var is not None
        return torch.cat([layer.running_mean, layer.running_var]).detach().clone()

    @staticmethod
    @torch.no_grad()
    def _write(layer: _BatchNorm, statistics: torch.Tensor) -> None:
        assert layer.running_mean is not None
        assert layer.running_var is not None
        mean, variance = statistics.chunk(2)
        # Through .data: autograd keeps the buffers of a training forward, though its backward does not read them, and
        # would refuse a change that it sees.
        layer.running_mean.data.copy_(mean)
        layer.running_var.data.copy_(variance)

    def _catch(self, index: int) -> Any:
        def hook(layer: _BatchNorm, inputs: Any, output: Any) -> None:
            if layer.training:
                self._caught[index].append(self._read(layer))
                self._write(layer, self._running[index])

        return hook

    @torch.no_grad()
    def fold_in(self, sums: torch.Tensor) -> torch.Tensor:
        """After a step's last backward: combine, write back, and add up `sums` [m] float64 over the ranks.

        One collective carries both. Every rank must have done equally many forwards. Returns the sums, the same bits on
        every rank.
        """
        rows = [torch.cat(list(forward)) for forward in zip(*self._caught, strict=True)]
        own = torch.cat([sums.view(torch.float32), *rows])  # the bits of the float64, first for their alignment
        from_all = self._group.gather_rows(own[None])
        bits, statistics = from_all.split([2 * len(sums), len(own) - 2 * len(sums)], dim=1)
        if self._layers:
            self._fold(statistics.reshape(self._group.world * len(rows), -1).mean(dim=0))
        return bits.contiguous().view(torch.float64).sum(dim=0)

    def _fold(self, mean: torch.Tensor) -> None:
        for index, part in enumerate(mean.split([r.numel() for r in self._running])):
            momentum = self._momenta[index]
            self._running[index] = (1.0 - momentum) * self._running[index] + momentum * part
            layer = self._layers[index]
            self._write(layer, self._running[index])
            assert layer.num_batches_tracked is not None
            layer.num_batches_tracked.sub_(len(self._caught[index]) - 1)  # counts steps, not this rank's forwards
            self._caught[index].clear()

    def close(self) -> None:
        for layer, momentum in zip(self._layers, self._momenta, strict=True):
            layer.momentum = momentum
        for hook in self._hooks:
            hook.remove()
