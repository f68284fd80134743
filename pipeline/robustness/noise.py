"""Keyed random numbers on the device: a sample's noise depends on its key alone, not on its batch.

The torch counterpart of `pipeline.rng`, which is numpy: same keys, same streams.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.distributed import to_device
from pipeline.rng import GOLDEN_GAMMA, MIX_1, MIX_2, sample_keys


def device_keys(
    sample_ids: NDArray[np.int64], device: torch.device, seed: int, purpose: str, *scope: int | str
) -> Tensor:
    """`pipeline.rng.sample_keys` as int64 [n] with the same bits, on `device`."""
    return to_device(torch.from_numpy(sample_keys(sample_ids, seed, purpose, *scope).view(np.int64)), device)


def _signed(x: int) -> int:
    """The int64 with the bits of a uint64: torch has no uint64 arithmetic, and int64 products wrap the same way."""
    return x - (1 << 64) if x >= 1 << 63 else x


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift of the uint64 bits in an int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix64(x: Tensor) -> Tensor:
    x = (x ^ _shift_right(x, 30)) * _signed(MIX_1)
    x = (x ^ _shift_right(x, 27)) * _signed(MIX_2)
    return x ^ _shift_right(x, 31)


def uniform_stream(keys: Tensor, count: int) -> Tensor:
    """The first `count` numbers of each key's SplitMix64 stream: [n] int64 -> [n, count] float32 in [0, 1)."""
    counters = torch.arange(1, count + 1, dtype=torch.int64, device=keys.device) * _signed(GOLDEN_GAMMA)
    bits = _mix64(keys[:, None] + counters)
    return _shift_right(bits, 40).to(torch.float32) * 2.0**-24


def uniform_noise(keys: Tensor, shape: Sequence[int]) -> Tensor:
    """Uniform numbers: keys [n] int64 (the uint64 of `pipeline.rng`, same bits) -> [n, *shape] float32 in [0, 1).

    Identical on every device: the top 24 of the 53 bits that `pipeline.rng.uniforms` uses.
    """
    return uniform_stream(keys, math.prod(shape)).view(-1, *shape)


def box_muller(uniforms: Tensor) -> Tensor:
    """Box and Muller (1958): [n, 2 m] in [0, 1) -> [n, 2 m] standard normal."""
    first, second = uniforms.chunk(2, dim=1)
    radius = (-2.0 * torch.log1p(-first)).sqrt()  # 1 - u is in (0, 1], so the logarithm is finite
    angle = 2.0 * math.pi * second
    return torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)


def gaussian_noise(keys: Tensor, shape: Sequence[int]) -> Tensor:
    """Standard normal numbers: keys [n] int64 -> [n, *shape] float32, equal across devices up to rounding."""
    count = math.prod(shape)
    return box_muller(uniform_stream(keys, count + count % 2))[:, :count].reshape(-1, *shape)


def derived_keys(keys: Tensor, numbers: Tensor) -> Tensor:
    """Streams for several independent draws per sample: keys [n] and numbers [m], both int64 -> [n, m] int64.

    Mixed as `pipeline.rng.sample_keys` mixes sample ids into a scope: a draw's stream neither depends on nor overlaps
    with those of other draws.
    """
    return _mix64(keys[:, None] ^ _mix64(numbers * _signed(GOLDEN_GAMMA) + 1))
