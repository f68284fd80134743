"""Reads untrusted pickles of numbers, text and arrays, and runs nothing that they contain.

A pickle is a program that may call anything it names. CIFAR and pseudo-labelled images are published as pickles, so
they are read by an unpickler whose `find_class` allows the few names that arrays need, and refuses all others before
anything is called. `numpy.dtype` itself is not allowed: a forged state makes it interpret bytes as pointers. The
program's instructions are checked before it runs, as five bytes can make Python's unpickler allocate 64 GiB.
"""

from __future__ import annotations

import pickle
import pickletools
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from pipeline.data.manifest import DataError

DTYPES = ("u1", "i1", "i2", "i4", "i8", "f4", "f8")


class _Dtype:
    """Stands in for numpy.dtype; plain numbers only, neither objects nor structures."""

    def __init__(self, code: str, *flags: int) -> None:
        if code not in DTYPES:
            raise ValueError(f"an array of {code!r} does not hold plain numbers")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, order, subarray, names, fields, *_ = state
        if (subarray, names, fields) != (None, None, None):
            raise ValueError("an array of structures does not hold plain numbers")
        self.dtype = self.dtype.newbyteorder(order)


class _Array:
    """An array whose values are its state, as in protocols 0 to 4."""

    def __init__(self, *empty: object) -> None:
        self.values = np.empty(0)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, fortran, data = state
        self._fill(data, dtype, shape, "F" if fortran else "C")

    def _fill(self, data: bytes | str, dtype: _Dtype, shape: tuple[int, ...], order: Any) -> None:
        # Python 2 had one type for text and bytes, so the unpickler decodes its bytes as latin-1.
        stored = data.encode("latin-1") if isinstance(data, str) else data
        self.values = np.frombuffer(stored, dtype.dtype).reshape(shape, order=order)


class _FilledArray(_Array):
    """An array that is constructed from its values, as in protocol 5."""

    def __init__(self, data: bytes, dtype: _Dtype, shape: tuple[int, ...], order: str) -> None:
        self._fill(data, dtype, shape, order)


class _Bytes:
    """bytes("text", "latin1"), as which protocols 0 to 2 hold bytes; bytes(n) would allocate n of them."""

    def __new__(cls, text: str, codec: str) -> bytes:  # type: ignore[misc]
        return bytes(text, codec)

    def __setstate__(self, state: object) -> None:
        raise ValueError("bytes have no state")


# Only classes, as a pickle could set the attributes of a function.
ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): None,  # only passed as an argument
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): _Bytes,
    **{(f"{core}.multiarray", "_reconstruct"): _Array for core in ("numpy.core", "numpy._core")},
    **{(f"{core}.numeric", "_frombuffer"): _FilledArray for core in ("numpy.core", "numpy._core")},
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ALLOWED:
            raise ValueError(f"it names {module}.{name}, which such a file does not need; it was not called")
        return ALLOWED[module, name]


def _check_sizes(stream: BinaryIO) -> None:
    """ValueError if the pickle announces more than it contains: bytes, or places in the unpickler's table of objects.

    The table is an array that grows to twice the greatest place; a pickler numbers places consecutively.
    """
    for number, (instruction, place, _) in enumerate(pickletools.genops(stream)):
        if instruction.name in ("PUT", "BINPUT", "LONG_BINPUT") and isinstance(place, int) and place > number:
            raise ValueError(f"instruction {number} stores object {place}, though there are not so many")


def read_pickle(stream: BinaryIO, path: str | Path) -> dict[str, Any]:
    """The dict in a pickle of any protocol, with numpy arrays among its values; `path` is used in messages.

    A str written by Python 2 is decoded as latin-1. Errors: DataError for a pickle that names anything but arrays, is
    damaged, or does not hold a dict.
    """
    try:
        _check_sizes(stream)
        stream.seek(0)
        contents = _Unpickler(stream, encoding="latin-1").load()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}") from None
    except Exception as error:
        # Damaged bytes are an arbitrary program, which may raise anything. It can call nothing but `ALLOWED`.
        raise DataError(f"{path} is refused as a pickle: {error or type(error).__name__}") from None
    if not isinstance(contents, dict):
        raise DataError(f"{path} holds {type(contents).__name__}, not a dict; is it the authors' file?")
    return {key: value.values if isinstance(value, _Array) else value for key, value in contents.items()}
