"""Pickles that hold numbers, text and arrays, and nothing that runs.

A pickle is a program that may call whatever it names. CIFAR and pseudo-labelled images are published as pickles, so
they are read here by an interpreter that knows the six names which arrays need. None of them is numpy's own: each
stands for it, and checks what it is given. Every other name is refused, before anything is called.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from pipeline.data.manifest import DataError

DTYPES = ("u1", "i1", "i2", "i4", "i8", "f4", "f8")
NDARRAY = "numpy.ndarray"
"""What the class ndarray becomes: a pickle only hands it on."""


class _Dtype:
    """Stands for numpy.dtype: plain numbers only, so neither objects nor structures."""

    __slots__ = ("dtype",)

    def __init__(self, code: str, *flags: int) -> None:
        if code not in DTYPES:
            raise ValueError(f"an array of {code!r} is none of numbers")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, order, subarray, names, fields, *_ = state
        if (subarray, names, fields) != (None, None, None):
            raise ValueError("an array of structures is none of numbers")
        self.dtype = self.dtype.newbyteorder(order)


class _Array:
    """Stands for an ndarray; `values` once it has its state."""

    __slots__ = ("values",)

    def __init__(self, values: NDArray[Any] | None = None) -> None:
        self.values = values

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, fortran, data = state
        self.values = _values(data, dtype, shape, "F" if fortran else "C")


def _values(data: bytes | str, dtype: _Dtype, shape: tuple[int, ...], order: Any) -> NDArray[Any]:
    # Python 2 had one type for text and bytes, so the unpickler hands its bytes over as latin-1.
    stored = data.encode("latin-1") if isinstance(data, str) else data
    return np.frombuffer(stored, dtype.dtype).reshape(shape, order=order)


class _Names:
    """The functions that pickled arrays call. Bound methods, as nothing in a pickle can change those."""

    __slots__ = ()

    def reconstruct(self, kind: object, shape: object, code: object) -> _Array:
        """numpy's way of making an empty array that gets its state next."""
        if kind != NDARRAY:
            raise ValueError("an array of a class of its own")
        return _Array()

    def frombuffer(self, data: bytes, dtype: _Dtype, shape: tuple[int, ...], order: str) -> _Array:
        """The same in one go, in pickles of protocol 5."""
        return _Array(_values(data, dtype, shape, order))

    def encode(self, text: str, encoding: str) -> bytes:
        """Python 3's way of writing bytes so that Python 2 can read them."""
        if encoding != "latin1":
            raise ValueError(f"bytes encoded as {encoding!r}")
        return text.encode("latin-1")

    def dtype(self, code: str, *flags: int) -> _Dtype:
        """What the numbers are; their byte order follows as its state."""
        return _Dtype(code, *flags)


_NAMES = _Names()
KNOWN: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): NDARRAY,
    ("numpy", "dtype"): _NAMES.dtype,
    ("_codecs", "encode"): _NAMES.encode,
    **{(f"{core}.multiarray", "_reconstruct"): _NAMES.reconstruct for core in ("numpy.core", "numpy._core")},
    **{(f"{core}.numeric", "_frombuffer"): _NAMES.frombuffer for core in ("numpy.core", "numpy._core")},
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in KNOWN:
            raise ValueError(f"it names {module}.{name}, which no such file needs, and which was not called")
        return KNOWN[module, name]


def read_pickle(stream: BinaryIO, path: str | Path) -> dict[str, Any]:
    """The dict in a pickle of any protocol, arrays among its values as numpy's; `path` is for messages.

    What Python 2 wrote as str is str, decoded as latin-1. Errors: DataError for a pickle that names anything but
    arrays, is damaged, or holds no dict.
    """
    try:
        contents = _Unpickler(stream, encoding="latin-1").load()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}") from None
    except Exception as error:
        # Damaged bytes are another program: there is no list of what it may raise. Nothing but `KNOWN` has run.
        raise DataError(f"{path} is refused as a pickle: {error or type(error).__name__}") from None
    if not isinstance(contents, dict):
        raise DataError(f"{path} holds no dict but {type(contents).__name__}; is it the authors' file?")
    return {key: value.values if isinstance(value, _Array) else value for key, value in contents.items()}
