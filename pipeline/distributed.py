"""The device that a worker computes on, and the group of workers that train together."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

log = logging.getLogger(__name__)

DRIVER_GPUS = Path("/proc/driver/nvidia/gpus")
"""Where NVIDIA's driver lists the machine's GPUs, whether or not torch can use them."""
OTHER_WHEELS = "see 'GPUs' in docs/guide.md for PyTorch's other builds"


OUT_OF_MEMORY = (
    "the GPU is out of memory; lower batch.micro_batch if it happens in training, evaluation.chunk or "
    "evaluation.noise_batch if in evaluation, under another --name, or end what else uses the GPU"
)
"""What a user is told, whatever the numbers of bytes: they differ each time, and would hide that a failure repeats."""


def failure_text(error: Exception) -> str:
    """An exception as it is recorded: the same text if the same happens again."""
    text = OUT_OF_MEMORY if isinstance(error, torch.OutOfMemoryError) else error
    return f"{type(error).__name__}: {text}"


def unusable_gpus() -> str | None:
    """Why torch uses none of this machine's GPUs; None if it has none, or if torch can, or was told not to."""
    gpus = len(list(DRIVER_GPUS.glob("*")))
    if not gpus or torch.cuda.is_available() or os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return None
    try:
        torch.cuda.init()
        reason = "no reason is known"
    except (AssertionError, RuntimeError) as error:  # the former from a build without CUDA
        reason = str(error).strip().partition("\n")[0]
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPUs only"
    return f"torch sees none of the {gpus} GPUs of this machine: {reason} (it is built for {build}; {OTHER_WHEELS})"


def pick_device(choice: str) -> torch.device:
    """'auto', 'cpu' or 'cuda' -> device.

    Errors: ValueError if 'cuda' is requested and no CUDA device is visible, or if torch has no code for the one that
    is.
    """
    if choice == "cuda" and not torch.cuda.is_available():
        reason = unusable_gpus() or "no CUDA device is visible"
        raise ValueError(f"workers.device = cuda: {reason}; use workers.device=auto or cpu")
    if choice == "cpu" or not torch.cuda.is_available():
        if choice == "auto" and (reason := unusable_gpus()) is not None:
            log.warning("workers.device = auto: using the CPU, as %s", reason)
        return torch.device("cpu")
    device = torch.device("cuda", torch.cuda.current_device())
    own, built_for = torch.cuda.get_device_capability(device), torch.cuda.get_arch_list()
    if torch.version.cuda is not None and not any(_runs(architecture, own) for architecture in built_for):
        gpu, code = f"{torch.cuda.get_device_name(device)} (sm_{own[0]}{own[1]})", ", ".join(built_for)
        raise ValueError(
            f"workers.device = {choice}: torch has no code for {gpu}, only for {code}; {OTHER_WHEELS}, or use "
            "workers.device=cpu"
        )
    return device


def _runs(architecture: str, capability: tuple[int, int]) -> bool:
    """Whether code for 'sm_90' runs on a GPU of capability (9, 0): the same major version, no newer minor one.

    'compute_90' is compiled on the GPU's machine, for any that is no older.
    """
    kind, _, number = architecture.partition("_")
    digits = "".join(filter(str.isdigit, number))
    built = int(digits[:-1]), int(digits[-1])
    return built <= capability and (kind == "compute" or built[0] == capability[0])


def make_deterministic(threads: int) -> None:
    """Fixed thread count, deterministic kernels and no TF32, for bitwise reproducibility.

    Call it before the first product of matrices on a GPU: cuBLAS reads its workspace setting then, and under
    deterministic algorithms torch refuses a product unless the setting is one of two.
    """
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
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
