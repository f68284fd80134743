"""Shrinking by area, compared with exact fractions and with OpenCV."""

from __future__ import annotations

import hashlib
from fractions import Fraction

import cv2
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pipeline.data.loading.resize import covered, resize_by_area, resize_by_area_numpy


def exact(region: NDArray[np.uint8], side: int) -> list[Fraction]:
    """Each new pixel's mean over its rectangle, pixel by pixel."""
    high, wide = region.shape[:2]

    def shares(length: int, i: int) -> dict[int, Fraction]:
        begin, end = Fraction(i * length, side), Fraction((i + 1) * length, side)
        overlaps = {k: min(end, Fraction(k + 1)) - max(begin, Fraction(k)) for k in range(length)}
        return {k: overlap / (end - begin) for k, overlap in overlaps.items() if overlap > 0}

    return [
        sum((a * b * int(region[y, x, c]) for y, a in rows.items() for x, b in columns.items()), Fraction(0))
        for rows in [shares(high, i) for i in range(side)]
        for columns in [shares(wide, j) for j in range(side)]
        for c in range(3)
    ]


def shrink(image: NDArray[np.uint8], top: int, left: int, high: int, wide: int, side: int) -> NDArray[np.uint8]:
    smaller = np.full((side, side, 3), 77, np.uint8)
    resize_by_area(image.reshape(-1), image.shape[1], top, left, high, wide, smaller)
    return smaller


@pytest.mark.slow
@given(st.data())
def test_each_new_pixel_is_the_mean_of_its_area(data):
    side = data.draw(st.integers(1, 6))
    high, wide = (data.draw(st.integers(side, 20)) for _ in range(2))
    top, left, below, beside = (data.draw(st.integers(0, 3)) for _ in range(4))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    # Black and white give the extreme sums.
    values = data.draw(st.sampled_from([(0, 1, 127, 254, 255), (0,), (255,), tuple(range(256))]))
    image = rng.choice(np.array(values, np.uint8), (top + high + below, left + wide + beside, 3))

    pixels = shrink(image, top, left, high, wide, side).reshape(-1).tolist()

    for mine, mean in zip(pixels, exact(image[top : top + high, left : left + wide], side), strict=True):
        assert abs(mine - mean) <= Fraction(1, 2) + Fraction(1, 1000)


@given(st.integers(1, 300), st.integers(1, 3000))
def test_shares_cover_every_pixel_once(count, more):
    length = count + more
    first, shares = np.empty(count, np.int64), np.empty((count, length // count + 2), np.float32)
    covered(length, first, shares)
    over = np.zeros(length + shares.shape[1])
    for begin, row in zip(first, shares, strict=True):
        assert abs(row.sum() - 1) < 1e-5
        over[begin : begin + len(row)] += row
    assert np.abs(over[:length] * length / count - 1).max() < 1e-4
    assert not over[length:].any()


def in_float64(image: NDArray[np.uint8], side: int) -> NDArray[np.float64]:
    """The means, computed as two matrix products."""

    def shares(length: int) -> NDArray[np.float64]:
        begin, pixel = np.arange(side)[:, None] * length / side, np.arange(length)
        return np.clip(np.minimum(begin + length / side, pixel + 1) - np.maximum(begin, pixel), 0, None) * side / length

    return np.einsum("iy,yxc,jx->ijc", shares(image.shape[0]), image, shares(image.shape[1]), optimize=True)


@settings(max_examples=40)
@given(st.integers(0, 99), st.integers(224, 700), st.integers(224, 700))
@example(0, 448, 224)
@example(0, 336, 448)
def test_pixels_equal_opencvs_unless_rounding_differs(seed, high, wide):
    image = np.random.default_rng(seed).integers(0, 256, (high, wide, 3), np.uint8)
    other = cv2.resize(image, (224, 224), interpolation=cv2.INTER_AREA)
    difference = np.abs(shrink(image, 0, 0, high, wide, 224).astype(int) - other)
    assert difference.max() <= 1
    means = in_float64(image, 224)[difference > 0]
    assert np.abs(means % 1 - 0.5).max(initial=0) < 1e-3


@settings(max_examples=60)
@given(st.integers(0, 99), st.integers(1, 40), st.integers(0, 150), st.integers(0, 150))
@example(0, 224, 276, 151)
def test_numpy_gives_the_same_bits(seed, side, more_high, more_wide):
    high, wide = side + more_high, side + more_wide
    image = np.random.default_rng(seed).integers(0, 256, (high, wide, 3), np.uint8)
    assert np.array_equal(resize_by_area_numpy(image, side), shrink(image, 0, 0, high, wide, side))


def test_results_are_bit_identical_on_all_processors():
    """The digest is the same with AVX-512, with AVX2 and with neither; fused multiply-adds would change it."""
    digest = hashlib.sha256()
    for high, wide, side in [(300, 451, 224), (225, 640, 224), (500, 375, 96), (256, 256, 224)]:
        numbers = np.arange(high * wide * 3, dtype=np.uint64) * np.uint64(2654435761)
        image = ((numbers >> np.uint64(13)) % np.uint64(256)).astype(np.uint8).reshape(high, wide, 3)
        digest.update(shrink(image, 0, 0, high, wide, side).tobytes())
    assert digest.hexdigest() == "8e67f554b5ed3e3691001a0e97fe1cf60a6c3466df378348b31a48ac889e094c"
