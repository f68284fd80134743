"""Decodes stored bytes to pixels, in threads that run without the GIL. The only module that imports FFCV's C library.

Stored bytes are read with pread, not from a mapped file: if that is truncated while in use, or its disk fails, SIGBUS
ends the process. Each image is compared with the manifest's checksum before it is decoded: libjpeg-turbo accepts many
damaged JPEGs, and damage to raw pixels cannot be detected otherwise.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import zlib
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, BinaryIO

import numba
import numba.typed
import numpy as np
import torch
from llvmlite import binding as llvm
from numba.core import types
from numpy.typing import NDArray

from pipeline.data.loading.resize import resize_by_area, resize_by_area_numpy
from pipeline.data.manifest import MODE_JPEG, MODE_RAW
from pipeline.data.sources.source import cache_folder

# Importing ffcv compiles a numba dict of two constants, which takes seconds and is not needed here, and limits torch to
# one thread. `numba.typed` is imported first, so that compilation is disabled for ffcv's own modules only.
_numba_config: Any = import_module("numba.core.config")
_torch_threads, _disable_jit = torch.get_num_threads(), _numba_config.DISABLE_JIT
_numba_config.DISABLE_JIT = True
import ffcv.libffcv as libffcv  # noqa: E402

_numba_config.DISABLE_JIT = _disable_jit
torch.set_num_threads(_torch_threads)

log = logging.getLogger(__name__)

TRUNCATED, CHECKSUM, UNDECODABLE = 1, 2, 3
REASONS = {
    TRUNCATED: "the file ends before its data",
    CHECKSUM: "stored bytes differ from the manifest's checksum",
    UNDECODABLE: "cannot be decoded",
}


def _external(name: str, *arguments: Any) -> Any:
    """A C function that compiled code finds by its name: an address would differ in every process."""
    return types.ExternalFunction(f"hydra_pipeline_{name}", types.int32(*arguments))


_imdecode = _external(
    *("imdecode", types.int64, types.uint64, types.uint32, types.uint32, types.int64),
    *(*[types.uint32] * 6, types.boolean, types.boolean),
)
_resize = _external("resize", *[types.int64] * 11)
_copy = _external("memcopy", types.int64, types.int64, types.uint64)
FUNCTIONS = {
    _imdecode: libffcv.ctypes_imdecode,
    _resize: libffcv.ctypes_resize,
    _copy: libffcv.ctypes_memcopy,
}
"""What compiled code calls FFCV's functions -> the function."""
SIGNATURE = types.void(
    types.uint8[::1],
    types.int64[:, ::1],
    types.int32[:, ::1],
    types.uint8[::1],
    types.uint8[:, :, :, ::1],
    types.int32[::1],
)


def decode_part(
    decoder: Callable[..., None],
    file: BinaryIO,
    table: NDArray[np.int64],
    crops: NDArray[np.int32],
    images: NDArray[np.uint8],
    status: NDArray[np.int32],
) -> None:
    """Read and decode one part of a batch into images and status, from the part's rows of table and crops."""
    ends = np.cumsum(table[:, 4])
    data = np.empty(int(ends[-1]), np.uint8)
    for n, (offset, size, checksum) in enumerate(table[:, 3:].tolist()):
        stored = data.data[int(ends[n]) - size : int(ends[n])]
        if os.preadv(file.fileno(), [stored], offset) < size:
            status[n] = TRUNCATED
        elif zlib.crc32(stored) != checksum:
            status[n] = CHECKSUM
    pixels = (table[:, 1] * table[:, 2])[table[:, 0] == MODE_JPEG]
    decoder(data, table, crops, np.empty(3 * pixels.max(initial=0), np.uint8), images, status)


def decode_uncompiled(
    data: NDArray[np.uint8],
    table: NDArray[np.int64],
    crops: NDArray[np.int32],
    scratch: NDArray[np.uint8],
    images: NDArray[np.uint8],
    status: NDArray[np.int32],
) -> None:
    """What `compiled_decoder` does, bit for bit, without the seconds that compiling takes: for a few images."""
    side, ends = images.shape[1], np.cumsum(table[:, 4])
    for n, (mode, height, width, _, size, _) in enumerate(table.tolist()):
        if status[n] != 0:
            continue
        pixels = data[int(ends[n]) - size : int(ends[n])]
        if mode == MODE_JPEG:
            stored, pixels = pixels, scratch[: height * width * 3]
            source, target = stored.ctypes.data, pixels.ctypes.data
            sizes = (height, width, target, height, width, 0, 0, 1, 1, False, False)
            if libffcv.ctypes_imdecode(source, size, *sizes) != 0:
                status[n] = UNDECODABLE
                continue
        elif mode != MODE_RAW or size != height * width * 3:
            status[n] = UNDECODABLE
            continue
        images[n] = crop_uncompiled(pixels.reshape(height, width, 3), crops[n], side)


def crop_uncompiled(pixels: NDArray[np.uint8], crop: NDArray[np.int32], side: int) -> NDArray[np.uint8]:
    """One crop (see `sampling`) of an image [height, width, 3], resized to [side, side, 3]."""
    height, width = pixels.shape[:2]
    top, left, crop_height, crop_width, flip = crop.tolist()
    if crop_height == side and crop_width == side:
        image = np.zeros((side, side, 3), np.uint8)
        rows, columns = slice(max(top, 0), max(top + side, 0)), slice(max(left, 0), max(left + side, 0))
        window = pixels[rows, columns]
        first_row, first = max(-top, 0), max(-left, 0)
        image[first_row : first_row + window.shape[0], first : first + window.shape[1]] = window
    elif crop_height >= side and crop_width >= side:
        image = resize_by_area_numpy(pixels[top : top + crop_height, left : left + crop_width], side)
    else:
        pixels, image = np.ascontiguousarray(pixels), np.empty((side, side, 3), np.uint8)
        box = (top, top + crop_height, left, left + crop_width)
        libffcv.ctypes_resize(0, pixels.ctypes.data, height, width, *box, image.ctypes.data, side, side)
    return image[:, ::-1] if flip else image


@numba.njit(nogil=True)
def _mirror(pixels, side):
    # Indices are unsigned: for signed ones numba checks at every use whether they count from the end.
    one, two, three = np.uintp(1), np.uintp(2), np.uintp(3)
    for row in range(side):
        a, b = np.uintp(row * side * 3), np.uintp((row * side + side - 1) * 3)
        while a < b:
            pixels[a], pixels[b] = pixels[b], pixels[a]
            pixels[a + one], pixels[b + one] = pixels[b + one], pixels[a + one]
            pixels[a + two], pixels[b + two] = pixels[b + two], pixels[a + two]
            a, b = a + three, b - three


@numba.njit(nogil=True)
def _jpeg_is(stored, height, width):
    """Whether the frame header of a JPEG claims this size: libjpeg allocates for what it claims."""
    at = 2
    while at + 9 <= len(stored) and stored[at] == 0xFF:
        marker = stored[at + 1]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            return (
                np.int64(stored[at + 5]) * 256 + stored[at + 6] == height
                and np.int64(stored[at + 7]) * 256 + stored[at + 8] == width
            )
        at += 2 + np.int64(stored[at + 2]) * 256 + stored[at + 3]
    return False


def _decode(data, table, crops, scratch, images, status):
    side, end = images.shape[1], 0
    for n in range(len(table)):
        mode, height, width, _, size, _ = table[n]
        stored, end = data[end : end + size], end + size
        if status[n] != 0:
            continue
        pixels = stored
        if mode == MODE_JPEG:
            if not _jpeg_is(stored, height, width):
                status[n] = UNDECODABLE
                continue
            pixels = scratch[: height * width * 3]
            start, into = np.int64(stored.ctypes.data), np.int64(pixels.ctypes.data)
            if _imdecode(start, size, height, width, into, height, width, 0, 0, 1, 1, False, False) != 0:
                status[n] = UNDECODABLE
                continue
        elif mode != MODE_RAW or size != height * width * 3:
            status[n] = UNDECODABLE
            continue

        top, left, crop_height, crop_width, flip = crops[n]
        image = images[n]
        source, target = np.int64(pixels.ctypes.data), np.int64(image.ctypes.data)
        if crop_height == side and crop_width == side:
            first, last = max(-left, 0), min(side, width - left)
            for row in range(side):
                if 0 <= top + row < height and first < last:
                    image[row, :first] = 0
                    offset = ((top + row) * width + left + first) * 3
                    _copy(source + offset, target + (row * side + first) * 3, (last - first) * 3)
                    image[row, last:] = 0
                else:
                    image[row] = 0
        elif crop_height >= side and crop_width >= side:
            resize_by_area(pixels, width, top, left, crop_height, crop_width, image)
        else:
            bottom, right = top + crop_height, left + crop_width
            _resize(0, source, height, width, top, bottom, left, right, target, side, side)
        if flip:
            _mirror(image.reshape(side * side * 3), side)


def decoder_folder() -> Path | None:
    """Where the compiled decoder is kept, made if need be; None if nothing can be written there.

    One for each processor model, numba and state of the sources: nodes of a cluster may share a home, and numba itself
    looks for changes in one file only.
    """
    sources = [Path(__file__).with_name(name).read_bytes() for name in ("decoder.py", "resize.py")]
    facts = (llvm.get_host_cpu_name(), llvm.get_host_cpu_features().flatten(), numba.__version__)
    digest = hashlib.sha256(b"\0".join([*sources, *map(str.encode, facts)])).hexdigest()
    try:
        folder = cache_folder() / "decoder" / digest[:16]
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # the second for a user without a home
        return None
    return folder if os.access(folder, os.W_OK) else None


@functools.cache
def compiled_decoder() -> Callable[..., None]:
    """The decoder, compiled by numba to run without the GIL; shared by all loaders of the process.

    Compiling takes seconds, so the result is kept for other processes of this user.
    """
    for ours, function in FUNCTIONS.items():
        llvm.add_symbol(ours.symbol, ctypes.cast(function, ctypes.c_void_p).value)
    folder = decoder_folder()
    if folder is not None:
        before, _numba_config.CACHE_DIR = _numba_config.CACHE_DIR, str(folder)
        try:
            return numba.njit(SIGNATURE, nogil=True, cache=True)(_decode)
        except Exception as error:  # a damaged file or a full disk, of which numba raises many types
            log.info("the compiled decoder was not kept in %s: %s", folder, error)
        finally:
            _numba_config.CACHE_DIR = before
    return numba.njit(SIGNATURE, nogil=True)(_decode)
