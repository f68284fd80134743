"""Connection sensitivity (SNIP: Lee, Ajanthan and Torr, ICLR 2019), which ranks a baseline's connections."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from pipeline.data.loading.loader import Batch
from pipeline.distributed import Group
from pipeline.models.pruning.maskable import maskable
from pipeline.robustness.noise import device_keys
from pipeline.robustness.objectives import Autocast, Objective, ObjectiveInput
from pipeline.robustness.objectives.base import craft_forward


def connection_sensitivity(
    network: nn.Module,
    micro_batches: Iterable[Batch],
    objective: Objective,
    autocast: Autocast,
    group: Group,
    *,
    seed: int,
    stage: str,
) -> dict[str, Tensor]:
    """|g * w| of every maskable weight, under its plain name: the sensitivity of the loss to scaling the
    connection (section 4.1; the paper divides by the sum over all connections, which changes no ranking).

    g is the gradient of the objective's loss, summed over the micro-batches of all ranks, at a network without scores
    in training mode: that of the stage's first update if nothing were pruned. BatchNorm's statistics are restored after
    each micro-batch, so all of them see the same network. Noise is keyed by (seed, stage, sample id).
    Collective. Errors: ValueError naming a weight whose gradient is not finite.
    """
    weights = {name: layer.weight for name, layer in maskable(network).items()}
    tensors = [weight for weight in weights.values() if isinstance(weight, Tensor)]
    sums = [torch.zeros_like(tensor, dtype=torch.float32) for tensor in tensors]
    before = [(buffer, buffer.clone()) for buffer in network.buffers()]
    forward = craft_forward(network, autocast)
    network.train()
    for batch in micro_batches:
        images, labels = batch.to(group.device)
        keys = device_keys(batch.ids.numpy(), group.device, seed, "snip", stage)
        zeros = torch.zeros_like(images)
        inputs = ObjectiveInput(network, forward, images, labels, keys, autocast, noise=zeros)
        gradients = torch.autograd.grad(objective(inputs).loss, tensors, materialize_grads=True)
        for total, gradient in zip(sums, gradients, strict=True):
            total += gradient
        for buffer, value in before:
            buffer.data.copy_(value)
    sensitivity: dict[str, Tensor] = {}
    for name, tensor, total in zip(weights, tensors, sums, strict=True):
        group.sum(total)
        sensitivity[name] = (total * tensor.detach()).abs()
        if not bool(torch.isfinite(sensitivity[name]).all()):
            raise ValueError(f"{name}: the dense network's gradient is not finite, so snip cannot rank its connections")
    return sensitivity
