"""One process of the GPUs' trial step: `python -m launch.doctor.gpu_step DEVICE WORLD STORE RANK`.

A small network takes a step in bf16 with deterministic kernels, twice from the same start; gradients are averaged over
the GPUs by NCCL (over gloo on a CPU).
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipeline.distributed import Group, make_deterministic
from pipeline.training.process_group import GroupConfig, join_group

GROUP_S = 300
IMAGES, SIDE, CLASSES = 16, 32, 10


def take_step(group: Group) -> list[Tensor]:
    """The parameters of a network after one step from a fixed start, float32; the same on every rank."""
    torch.manual_seed(0)
    layers = (
        *(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 16, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, CLASSES)),
    )
    network: Any = nn.Sequential(*layers)
    network = network.to(group.device, memory_format=torch.channels_last)
    generator = torch.Generator().manual_seed(group.rank)
    images = torch.rand(IMAGES, 3, SIDE, SIDE, generator=generator).to(group.device)
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.randint(CLASSES, (IMAGES,), generator=generator).to(group.device)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    with torch.autocast(group.device.type, torch.bfloat16):
        loss = nn.functional.cross_entropy(network(images).float(), labels)
    loss.backward()
    for parameter in network.parameters():
        assert parameter.grad is not None
        group.sum(parameter.grad).div_(group.world)
    optimizer.step()
    return [parameter.detach() for parameter in network.parameters()]


def check_step(group: Group) -> None:
    """Errors: RuntimeError if the step is not repeatable, not finite, or differs between ranks."""
    first, second = take_step(group), take_step(group)
    if not all(torch.equal(a, b) for a, b in zip(first, second, strict=True)):
        raise RuntimeError("the same step twice had two results: its kernels are not deterministic")
    total = torch.stack([parameter.double().sum() for parameter in first]).sum()
    if not torch.isfinite(total):
        raise RuntimeError("a step in bf16 is not finite")
    if len(set(group.gather(total.item()))) > 1:
        raise RuntimeError("the GPUs' gradients were not averaged: their networks differ after the step")


def main(device: str, world: str, store: str, rank: str) -> int:
    """Join the others, take the step."""
    here = torch.device(device, int(rank)) if device == "cuda" else torch.device(device)
    if device == "cuda":
        torch.cuda.set_device(here)
    make_deterministic(threads=1)
    config = GroupConfig(backend="nccl" if device == "cuda" else "gloo", timeout_s=GROUP_S, store=store)
    join_group(config, None, int(rank), int(world))
    try:
        check_step(Group(int(rank), int(world), here))
    finally:
        dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
