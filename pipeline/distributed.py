"""From the processor's memory to the device that computes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor's copy on a device; on the CPU the tensor itself.

    Through page-locked memory, from where a GPU fetches it in its own time: a copy from other memory holds the program
    up until the GPU has done all that it was given before.
    """
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


@dataclass(frozen=True)
class Group:
    rank: int
    world: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def broadcast(self, value: Any) -> Any:
        """Rank 0's picklable value, on every rank."""
        if self.world == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Every rank's picklable value in rank order, on every rank."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def gather_rows(self, rows: torch.Tensor) -> torch.Tensor:
        """[n, d] on every rank (n the same everywhere) -> [world * n, d], ranks in order."""
        if self.world == 1:
            return rows
        out = rows.new_empty((self.world * rows.shape[0], *rows.shape[1:]))
        dist.all_gather_into_tensor(out, rows.contiguous())
        return out

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()


def pick_device(choice: str) -> torch.device:
    """'auto', 'cpu' or 'cuda' -> device. Errors: ValueError where CUDA was asked for and there is none."""
    if choice == "cuda" and not torch.cuda.is_available():
        raise ValueError("workers.device = cuda: no CUDA device is visible; use workers.device=auto or cpu")
    if choice == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def make_deterministic(threads: int) -> None:
    """Fixed thread count and deterministic kernels: part of what makes a run repeat bit for bit."""
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True)
    # Filling finds bugs, at the price of a pass over every buffer.
    torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]
    torch.backends.cudnn.benchmark = False
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
