"""Pickles of arrays are read as by Python's own unpickler; anything else that a pickle could do is refused."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import re
import resource
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.manifest import DataError
from pipeline.data.sources.safe_pickle import DTYPES, read_pickle
from tests.support.synthetic_data import python2_pickle


def read_bytes(data: bytes) -> dict[str, Any]:
    return read_pickle(io.BytesIO(data), "some.pickle")


arrays = st.builds(
    lambda code, order, shape, fortran, seed: np.asarray(
        np.random.default_rng(seed).integers(0, 100, shape).astype(np.dtype(code).newbyteorder(order)),
        order="F" if fortran else "C",
    ),
    st.sampled_from(DTYPES),
    st.sampled_from("<>"),
    st.lists(st.integers(1, 4), min_size=1, max_size=4),
    st.booleans(),
    st.integers(0, 99),
)


@settings(max_examples=60)
@given(array=arrays, protocol=st.integers(0, pickle.HIGHEST_PROTOCOL), labels=st.lists(st.integers(-(2**40), 2**40)))
def test_arrays_lists_and_text_come_back_from_every_protocol(
    array: np.ndarray, protocol: int, labels: list[int]
) -> None:
    contents = {"data": array, "labels": labels, "title": "a batch", "raw": b"\x00\xff"}
    for name in ("numpy.core", "numpy._core"):  # before numpy 2, and since
        data = pickle.dumps(contents, protocol)
        data = re.sub(rb"numpy\._?core(?=\.)", name.encode(), data) if protocol < 4 else data
        contents_read = read_bytes(data)
        assert {key: value for key, value in contents_read.items() if key != "data"} == {
            key: value for key, value in contents.items() if key != "data"
        }
        assert contents_read["data"].dtype == array.dtype
        np.testing.assert_array_equal(contents_read["data"], array)


def test_a_pickle_of_python_2_is_read_as_by_python_itself() -> None:
    array = np.random.default_rng(0).integers(0, 256, (3, 300), dtype=np.uint8)
    data = python2_pickle({"data": array, "labels": [1, 2, 300], "batch_label": "x" * 300})
    expected = pickle.loads(data, encoding="latin1")
    contents = read_bytes(data)
    np.testing.assert_array_equal(expected.pop("data"), array)
    np.testing.assert_array_equal(contents.pop("data"), array)
    assert contents == expected


class Calls:
    """Pickled as a call of `function` with `arguments`."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self._call = function, arguments

    def __reduce__(self) -> Any:
        return self._call


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_calls_in_a_pickle_are_refused_and_not_run(tmp_path: Path, protocol: int) -> None:
    """Control: Python's own unpickler does run them."""
    victim = tmp_path / "made by the pickle"
    for function, arguments in ((os.mkdir, (str(victim),)), (eval, (f"__import__('os').mkdir({str(victim)!r})",))):
        data = pickle.dumps({"data": Calls(function, *arguments)}, protocol)
        pickle.loads(data)
        assert victim.exists()
        victim.rmdir()
        with pytest.raises(DataError, match=r"some\.pickle is refused as a pickle: it names \w+\.(mkdir|eval)"):
            read_bytes(data)
        assert not victim.exists()


@pytest.mark.parametrize(
    "contents",
    [
        {"data": np.array([object], dtype=object)},
        {"data": np.array([1, "a"], dtype=object)},
        {"data": np.array([(1, 2)], dtype=[("a", "u1"), ("b", "u1")])},
        {"data": np.float64},
        {"data": np.array(["text"])},
        {"data": np.datetime64("2020-01-01")},
        {"data": range(3)},
        [1, 2],
    ],
    ids=["objects", "plain objects", "structures", "class", "text", "scalar", "range", "no dict"],
)
def test_other_pickles_are_refused_in_every_protocol(contents: object) -> None:
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        with pytest.raises(DataError, match=r"some\.pickle"):
            read_bytes(pickle.dumps(contents, protocol))


@pytest.mark.parametrize(
    "program",
    [
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\ndtype\nK\x00U\x01btR.",
        b"cnumpy.core.multiarray\n_reconstruct\n}(U\x0c__defaults__K\x01ub.",
        b"cnumpy.core.multiarray\n_reconstruct\nN}(U\x04__code__K\x01u\x86b.",
        b"cnumpy.core.multiarray\n_reconstruct.__globals__\n.",
        b"cnumpy\nndarray\n)\x81.",
        b"c_codecs\nencode\n}(U\x01aK\x01ub.",
        b"c_codecs\nencode\nN}(U\x01aK\x01u\x86b.",
        b"c_codecs\nencode\n(X\x01\x00\x00\x00aX\x03\x00\x00\x00hextR.",
        b"cnumpy\ndtype\n(U\x02u1tR}b.",
        b"\x82\x01.",
        b"I1\nQ.",
        b"",
    ],
)
def test_forged_programs_are_refused_and_do_not_change_the_reader(program: bytes) -> None:
    with pytest.raises(DataError, match=r"some\.pickle"):
        read_bytes(program)
    np.testing.assert_array_equal(read_bytes(pickle.dumps({"data": np.arange(3)}))["data"], [0, 1, 2])


DTYPE = b"cnumpy\ndtype\n(U\x02%btR"
ARRAY = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nNNtR(K\x01(K\x01t%b\x89U\x08ABCDEFGHtb"


@pytest.mark.parametrize(
    ("code", "state"),
    [
        (b"i8", b"(K\x03U\x01<" + DTYPE % b"i8" + b"NNtb"),
        (b"i8", b"(K\x03U\x01|N(U\x01at}U\x01a(" + DTYPE % b"i8" + b"K\x00tstb"),
        (b"V8", b"(K\x03U\x01|N(U\x01at}U\x01a(" + DTYPE % b"O8" + b"K\x00tstb"),
        (b"O8", b""),
    ],
    ids=["array in an array", "fields", "bytes as pointers", "objects"],
)
def test_a_forged_dtype_is_refused(code: bytes, state: bytes) -> None:
    """numpy's own dtype would dereference pointers in such a state. Control: the plain dtype is read."""
    whole = b"}U\x04data" + ARRAY + b"s."
    np.testing.assert_array_equal(read_bytes(whole % (DTYPE % b"i8"))["data"], np.frombuffer(b"ABCDEFGH", "i8"))
    with pytest.raises(DataError, match="does not hold plain numbers"):
        read_bytes(whole % (DTYPE % code + state))


@pytest.mark.parametrize(
    "program",
    [
        b"}r\xff\xff\xff\x7f.",
        b"}p2147483647\n.",
        b"\x96" + (1 << 35).to_bytes(8, "little") + b".",
        b"\x8e" + (1 << 35).to_bytes(8, "little") + b".",
        b"c_codecs\nencode\n(\x8a\x05" + (1 << 35).to_bytes(5, "little") + b"tR.",
    ],
    ids=["place", "place in text", "bytearray", "bytes", "empty bytes"],
)
def test_sizes_are_checked_before_memory_is_allocated(program: bytes) -> None:
    """Each asks for 32 GiB or more, which Linux would grant and then end some process for."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DataError, match=r"some\.pickle is refused as a pickle"):
        read_bytes(program)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 1 << 10, "in KiB"


@settings(max_examples=200)
@given(st.data())
def test_a_damaged_pickle_is_refused_or_is_a_dict(data: st.DataObject) -> None:
    whole = python2_pickle({"data": np.arange(40, dtype=np.uint8).reshape(4, 10), "labels": [1, 2, 3, 4]})
    place = data.draw(st.integers(0, len(whole) - 1))
    with pytest.raises(DataError, match=r"some\.pickle"):
        read_bytes(whole[:place])
    changed = bytearray(whole)
    changed[place] = data.draw(st.integers(0, 255))
    with contextlib.suppress(DataError):
        assert isinstance(read_bytes(bytes(changed)), dict)
