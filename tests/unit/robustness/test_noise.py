"""Attack noise: the streams of pipeline.rng in torch, with the documented distributions."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pipeline import rng
from pipeline.robustness.noise import derived_keys, gaussian_noise, uniform_noise


def keys_of(count: int, *scope: int | str) -> Tensor:
    return torch.from_numpy(rng.sample_keys(np.arange(count), 0, "attack", *scope).view(np.int64))


@given(st.lists(st.integers(0, (1 << 64) - 1), min_size=1, max_size=5), st.tuples(st.integers(1, 3), st.integers(1, 9)))
def test_uniform_noise_matches_the_numpy_streams(key_list: list[int], shape: tuple[int, int]) -> None:
    key_array = np.array(key_list, dtype=np.uint64)
    noise = uniform_noise(torch.from_numpy(key_array.view(np.int64)), shape)
    assert noise.dtype == torch.float32
    assert noise.shape == (len(key_list), *shape)
    top_24_bits = np.floor(rng.uniforms(key_array, math.prod(shape)) * 2.0**24)
    assert np.array_equal(noise.flatten(1).double().numpy() * 2.0**24, top_24_bits)


@pytest.mark.parametrize("noise", [uniform_noise, gaussian_noise])
def test_a_samples_noise_does_not_depend_on_its_batch(noise: Callable[..., Tensor]) -> None:
    batch = noise(keys_of(8), (3, 5, 5))
    alone = torch.cat([noise(key.view(1), (3, 5, 5)) for key in keys_of(8)])
    torch.testing.assert_close(batch, alone, rtol=1e-6, atol=1e-6)
    assert not torch.equal(batch, noise(keys_of(8, 1), (3, 5, 5)))


@pytest.mark.parametrize(
    ("noise", "distribution"), [(uniform_noise, scipy.stats.uniform), (gaussian_noise, scipy.stats.norm)]
)
def test_noise_has_its_distribution(noise: Callable[..., Tensor], distribution: scipy.stats.rv_continuous) -> None:
    numbers = noise(keys_of(50), (3, 7, 19)).double().numpy()
    assert scipy.stats.kstest(numbers.ravel(), distribution.cdf).pvalue > 1e-3
    flat = numbers.reshape(50, -1)
    for first, second in ((flat[:, :-1], flat[:, 1:]), (flat[:, :199], flat[:, 200:]), (flat[:-1], flat[1:])):
        correlation = np.corrcoef(first.ravel(), second.ravel())[0, 1]
        assert abs(correlation) < 4 / math.sqrt(first.size)


@given(st.integers(0, 2**31), st.lists(st.integers(0, 2**40), min_size=1, max_size=8))
def test_derived_keys_are_mixed_as_sample_keys_are(seed: int, numbers: list[int]) -> None:
    scopes = np.array([rng.scope_key(seed, "certify"), rng.scope_key(seed, "attack")], dtype=np.uint64)
    derived = derived_keys(torch.from_numpy(scopes.view(np.int64)), torch.tensor(numbers))
    for row, purpose in zip(derived, ("certify", "attack"), strict=True):
        expected = rng.sample_keys(np.array(numbers), seed, purpose)
        assert np.array_equal(row.numpy().view(np.uint64), expected)


def test_draws_of_one_sample_are_independent() -> None:
    draws = gaussian_noise(derived_keys(keys_of(4), torch.arange(50)).flatten(), (3, 7, 19)).double().numpy()
    assert scipy.stats.kstest(draws.ravel(), scipy.stats.norm.cdf).pvalue > 1e-3
    flat = draws.reshape(200, -1)
    for first, second in ((flat[:-1], flat[1:]), (flat[:-1, 1:], flat[1:, :-1]), (flat[:150], flat[50:])):
        correlation = np.corrcoef(first.ravel(), second.ravel())[0, 1]
        assert abs(correlation) < 4 / math.sqrt(first.size)
