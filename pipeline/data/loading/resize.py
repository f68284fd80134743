"""Shrinks images by area: a new pixel is the mean of those that it covers, as in OpenCV's INTER_AREA.

OpenCV sums one channel of one pixel at a time, which took two fifths of the time of reading photographs. Here rows are
summed first, many numbers at once, and then the columns of the result. Sums are float32, in a fixed order and without
fused multiply-adds, so that they are bit-identical on every processor.
"""

from __future__ import annotations

import numba
import numpy as np
from numpy.typing import NDArray


@numba.njit(nogil=True)
def covered(length, first, shares):
    """Which of `length` pixels each of n = len(first) larger ones covers: those from first[i], with weights shares[i].

    Fills first int64 [n] and shares float32 [n, k], where k is at least length / n + 2. In units of 1 / n of a pixel
    all edges are integers.
    """
    count = len(first)
    for i in range(count):
        begin, end = i * length, (i + 1) * length
        first[i] = begin // count
        for k in range(shares.shape[1]):
            pixel = (first[i] + k) * count
            shares[i, k] = max(min(end, pixel + count) - max(begin, pixel), 0) / length


@numba.njit(nogil=True)
def _set_row(sums, row, share):
    for i in range(len(sums)):
        sums[i] = share * np.float32(row[i])


@numba.njit(nogil=True)
def _add_row(sums, row, share):
    for i in range(len(sums)):
        sums[i] += share * np.float32(row[i])


@numba.njit(nogil=True)
def resize_by_area(pixels, width, top, left, high, wide, image):
    """Shrink a region of an image into `image`, whose side must not exceed the region's height or width.

    pixels uint8 [height * width * 3], the region's rows from top to top + high, its columns from left to left + wide;
    image uint8 [side, side, 3].
    """
    side = len(image)
    most = max(high, wide) // side + 2
    rows, row_shares = np.empty(side, np.int64), np.empty((side, most), np.float32)
    columns, column_shares = np.empty(side, np.int64), np.empty((side, most), np.float32)
    covered(high, rows, row_shares)
    covered(wide, columns, column_shares)

    sums = np.zeros((wide + most) * 3, np.float32)  # shares of columns past the end are 0
    summed, target = sums[: wide * 3], image.reshape(side * side * 3)
    # Indices are unsigned: for signed ones numba checks at every use whether they count from the end.
    one, two, three, taps = np.uintp(1), np.uintp(2), np.uintp(3), np.uintp(wide // side + 2)
    place = np.uintp(0)
    for i in range(side):
        start = ((top + rows[i]) * width + left) * 3
        _set_row(summed, pixels[start : start + wide * 3], row_shares[i, 0])
        for k in range(1, most):
            if row_shares[i, k] > 0:
                start += width * 3
                _add_row(summed, pixels[start : start + wide * 3], row_shares[i, k])
        for j in range(side):
            at, shares = np.uintp(columns[j]) * three, column_shares[j]
            red = green = blue = np.float32(0.5)
            for k in range(taps):
                red += shares[k] * sums[at]
                green += shares[k] * sums[at + one]
                blue += shares[k] * sums[at + two]
                at += three
            target[place], target[place + one], target[place + two] = np.uint8(red), np.uint8(green), np.uint8(blue)
            place += three


def resize_by_area_numpy(region: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    """`resize_by_area` of a region [height, width, 3] that it takes whole, bit for bit and without compiling.

    numpy rounds every product and every sum, and the sums are in the same order.
    """
    high, wide = region.shape[:2]
    rows, row_shares = _covered(high, side)
    columns, column_shares = _covered(wide, side)
    sums = np.zeros((side, wide, 3), np.float32)
    for k in range(row_shares.shape[1]):
        # A pixel of share 0 adds 0, so that which pixel it is does not matter.
        sums += row_shares[:, k, None, None] * region[np.minimum(rows + k, high - 1)].astype(np.float32)
    means = np.full((side, side, 3), 0.5, np.float32)
    for k in range(column_shares.shape[1]):
        means += column_shares[:, k, None] * sums[:, np.minimum(columns + k, wide - 1)]
    return means.astype(np.uint8)


def _covered(length: int, count: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """`covered` as arrays: first int64 [count] and shares float32 [count, length // count + 2]."""
    begin = np.arange(count)[:, None] * length
    first = begin[:, 0] // count
    pixel = (first[:, None] + np.arange(length // count + 2)) * count
    overlap = np.minimum(begin + length, pixel + count) - np.maximum(begin, pixel)
    return first, (np.maximum(overlap, 0) / length).astype(np.float32)
