"""Counter-based random numbers: each one is a function of its key alone.

The key is (seed, purpose, phase, step, sample id). Rank, number of workers and generator state play no part, so a
resumed or rescaled run draws the same numbers. SplitMix64 (Steele, Lea and Flood, OOPSLA 2014) is the
generator: each key starts its own stream, and the n-th number of a stream is computed without those before it.

numpy only; `pipeline.robustness.noise` continues the same streams on the device.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

GOLDEN_GAMMA = 0x9E3779B97F4A7C15
MIX_1 = 0xBF58476D1CE4E5B9
MIX_2 = 0x94D049BB133111EB


def mix64(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's finalizer, elementwise: a bijection of uint64 whose output bits are uniform."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(MIX_1)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(MIX_2)
    return x ^ (x >> np.uint64(31))


def scope_key(seed: int, purpose: str, *scope: int | str) -> int:
    """One uint64 for (seed, purpose, scope...), for example `scope_key(0, "crop", epoch)`.

    The parts are hashed with their types and lengths (BLAKE2b), so that ("a", "bc") and ("ab", "c") differ, as do 1
    and "1".
    """
    digest = hashlib.blake2b(digest_size=8)
    for part in (seed, purpose, *scope):
        encoded = f"{type(part).__name__}:{part}".encode()
        digest.update(len(encoded).to_bytes(4, "little") + encoded)
    return int.from_bytes(digest.digest(), "little")


def sample_keys(sample_ids: NDArray[np.int64], seed: int, purpose: str, *scope: int | str) -> NDArray[np.uint64]:
    """One key per sample: shape [n] int64 -> shape [n] uint64."""
    base = np.uint64(scope_key(seed, purpose, *scope))
    ids = sample_ids.astype(np.uint64)
    return mix64(base ^ mix64(ids * np.uint64(GOLDEN_GAMMA) + np.uint64(1)))


def uniforms(keys: NDArray[np.uint64], count: int) -> NDArray[np.float64]:
    """The first `count` numbers of every key's stream: shape [n] -> [n, count], float64 in [0, 1)."""
    counters = (np.arange(1, count + 1, dtype=np.uint64)) * np.uint64(GOLDEN_GAMMA)
    bits = mix64(keys[:, None] + counters[None, :])
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53
