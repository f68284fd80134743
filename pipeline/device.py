"""From the processor's memory to the device that computes."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor's copy on a device; on the CPU the tensor itself.

    Through page-locked memory, from where a GPU fetches it in its own time: a copy from other memory holds the program
    up until the GPU has done all that it was given before.
    """
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
