"""The device that a worker computes on, and the group of workers that train together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def pick_device(choice: str) -> torch.device:
    """'auto', 'cpu' or 'cuda' -> device. Errors: ValueError if 'cuda' is requested and no CUDA device is visible."""
    if choice == "cuda" and not torch.cuda.is_available():
        raise ValueError("workers.device = cuda: no CUDA device is visible; use workers.device=auto or cpu")
    if choice == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def make_deterministic(threads: int) -> None:
    """Fixed thread count, deterministic kernels and no TF32, for bitwise reproducibility."""
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True)
    # Filling uninitialised memory is for debugging and costs a pass over every buffer.
    torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]
    torch.backends.cudnn.benchmark = False
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor's copy on a device; on the CPU the tensor itself.

    Copies to a GPU are asynchronous, through page-locked memory: one from pageable memory blocks the caller until the
    GPU has finished its queued work.
    """
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


@dataclass(frozen=True)
class Group:
    """The process group as one rank sees it. Its methods are collective; with a world size of 1 they do nothing."""

    rank: int
    world: int
    """Number of ranks."""
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

    def gather_rows(self, rows: Tensor) -> Tensor:
        """[n, d] on every rank, with the same n -> [world * n, d] in rank order, on every rank."""
        if self.world == 1:
            return rows
        out = rows.new_empty((self.world * rows.shape[0], *rows.shape[1:]))
        dist.all_gather_into_tensor(out, rows.contiguous())
        return out

    def sum(self, values: Tensor) -> Tensor:
        """All-reduce in place; returns `values`."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()
