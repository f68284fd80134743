"""Counter-based random numbers: SplitMix64 against published numbers, independence of scopes, uniformity."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from pipeline.rng import GOLDEN_GAMMA, mix64, sample_keys, scope_key, uniforms

MASK = (1 << 64) - 1


def mix_in_python(x: int) -> int:
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


@given(st.integers(0, MASK))
def test_mix64_equals_unbounded_integer_arithmetic(x: int) -> None:
    assert int(mix64(np.array([x], dtype=np.uint64))[0]) == mix_in_python(x)


def test_stream_of_key_1234567_is_the_published_one() -> None:
    # The first numbers of SplitMix64 seeded with 1234567, as widely published for checking implementations.
    expected = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    counters = np.arange(1, 6, dtype=np.uint64) * np.uint64(GOLDEN_GAMMA)
    assert mix64(np.uint64(1234567) + counters).tolist() == expected
    top_53 = uniforms(np.array([1234567], dtype=np.uint64), 5)[0] * 2.0**53
    assert top_53.tolist() == [float(x >> 11) for x in expected]


@given(st.integers(0, MASK), st.integers(1, 30), st.integers(1, 30))
def test_a_longer_stream_continues_a_shorter_one(key: int, short: int, more: int) -> None:
    keys = np.array([key], dtype=np.uint64)
    assert np.array_equal(uniforms(keys, short + more)[:, :short], uniforms(keys, short))


scopes = st.tuples(
    st.integers(0, 5), st.sampled_from(["a", "ab", "b", "1"]), st.integers(0, 5), st.sampled_from(["", "1"])
)


@given(scopes, scopes)
def test_scopes_share_a_key_only_when_equal(first: tuple, second: tuple) -> None:
    assert (scope_key(*first) == scope_key(*second)) == (first == second)


def test_scope_parts_are_not_concatenated() -> None:
    keys = {scope_key(0, "a", "bc"), scope_key(0, "ab", "c"), scope_key(0, "abc"), scope_key(0, "a", "b", "c")}
    assert len(keys) == 4
    assert scope_key(0, "crop", 1) != scope_key(1, "crop", 0)
    assert scope_key(0, "crop", 1) != scope_key(0, "crop", "1")


def test_sample_keys_depend_on_the_sample_and_not_on_its_position() -> None:
    ids = np.arange(5000, dtype=np.int64)
    keys = sample_keys(ids, 0, "attack", "prune", 3)
    order = np.random.default_rng(0).permutation(5000)
    assert np.array_equal(sample_keys(ids[order], 0, "attack", "prune", 3), keys[order])
    assert len(np.unique(keys)) == 5000
    assert not np.intersect1d(keys, sample_keys(ids, 0, "attack", "prune", 4)).size


@pytest.mark.parametrize("axis", ["along one stream", "across samples", "across steps"])
def test_numbers_are_uniform_and_uncorrelated(axis: str) -> None:
    if axis == "along one stream":
        numbers = uniforms(sample_keys(np.array([3]), 0, "attack"), 20_000)[0]
    elif axis == "across samples":
        numbers = uniforms(sample_keys(np.arange(20_000), 0, "attack"), 1)[:, 0]
    else:
        keys = [sample_keys(np.array([3]), 0, "attack", step) for step in range(5_000)]
        numbers = uniforms(np.concatenate(keys), 1)[:, 0]
    assert scipy.stats.kstest(numbers, "uniform").pvalue > 1e-3
    lag_one = np.corrcoef(numbers[:-1], numbers[1:])[0, 1]
    assert abs(lag_one) < 4 / np.sqrt(len(numbers))
