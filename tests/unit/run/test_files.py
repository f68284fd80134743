"""Small files: atomic writing, strict reading."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.run import files

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


@settings(
    deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(value=json_values)
def test_json_is_read_back(tmp_path: Path, value: object) -> None:
    path = tmp_path / "value.json"
    files.atomic_write_json(path, value)
    assert files.read_json(path) == value
    assert os.listdir(tmp_path) == ["value.json"]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "value.json"
    files.atomic_write_text(path, "old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        files.atomic_write_text(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["value.json"]


def test_a_new_file_appears_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the rename, all content is in the temporary file, which is in the same folder."""
    path, seen = tmp_path / "value.json", []
    replace = os.replace

    def watch(source: Path, target: Path) -> None:
        seen.append((path.exists(), Path(source).read_text(), Path(source).parent == path.parent))
        replace(source, target)

    monkeypatch.setattr(os, "replace", watch)
    files.atomic_write_text(path, "all of it")
    assert seen == [(False, "all of it", True)]


def test_the_mode_is_as_requested(tmp_path: Path) -> None:
    files.atomic_write_text(tmp_path / "secret", "x", mode=0o600)
    assert (tmp_path / "secret").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b'{"a": 1'])
def test_damaged_json_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "value.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{path} cannot be read: "):
        files.read_json(path)


def test_missing_json_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{tmp_path / 'absent'} does not exist"):
        files.read_json(tmp_path / "absent")
    with pytest.raises(ValueError, match=f"{tmp_path} cannot be read: "):
        files.read_json(tmp_path)


def test_sha256(tmp_path: Path) -> None:
    data = json.dumps(list(range(100_000))).encode()
    (tmp_path / "data").write_bytes(data)
    assert files.sha256_of(tmp_path / "data") == hashlib.sha256(data).hexdigest()
