"""The baseline of the step: a plain PyTorch loop that follows best practice, without any code of this project.

Channels-last memory, fused SGD, gradients set to None, cross-entropy. Whether bf16 and torch.compile are faster depends
on the machine, so `candidates` has all four combinations and the benchmark takes the fastest.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torchvision
from torch.nn import functional as F


def plain_step(
    arch: str, images: torch.Tensor, labels: torch.Tensor, parts: int, *, bf16: bool, compiled: bool
) -> Callable[[], None]:
    """One optimizer step per call: images uint8 [n, 3, s, s], labels int64 [n], in `parts` equal micro-batches."""
    where = images.device
    network = torchvision.models.get_model(arch, num_classes=1000).to(where).train()
    network = network.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4, fused=True)
    mean = torch.tensor([0.485, 0.456, 0.406], device=where).view(1, 3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225], device=where).view(1, 3, 1, 1)
    forward = torch.compile(network) if compiled else network

    def step() -> None:
        for x, y in zip(images.chunk(parts), labels.chunk(parts), strict=True):
            with torch.autocast(where.type, torch.bfloat16, enabled=bf16):
                logits = forward((x.float().div(255.0) - mean) / std)
            (F.cross_entropy(logits.float(), y) / parts).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def candidates(arch: str, images: torch.Tensor, labels: torch.Tensor, parts: int) -> dict[str, Callable[[], None]]:
    """Label -> step, for {fp32, bf16} x {eager, compile}."""
    return {
        f"baseline {'bf16' if bf16 else 'fp32'} {'compile' if compiled else 'eager'}": plain_step(
            arch, images, labels, parts, bf16=bf16, compiled=compiled
        )
        for compiled in (False, True)
        for bf16 in (False, True)
    }
