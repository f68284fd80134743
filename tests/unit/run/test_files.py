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
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
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


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("[" * 100_000, "nested more than 64 levels deep"),
        ('{"a": ' * 100 + "1" + "}" * 100, "nested more than 64 levels deep"),
        ("9" * 5000, "a number of 5000 digits"),
        ("[NaN]", "the number NaN, which JSON lacks"),
        ("-Infinity", "the number -Infinity, which JSON lacks"),
    ],
    ids=["very deep", "deep", "digits", "nan", "infinity"],
)
def test_json_that_no_later_step_can_handle_is_refused(tmp_path: Path, content: str, reason: str) -> None:
    path = tmp_path / "value.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=f"{path} cannot be read: .*{reason}"):
        files.read_json(path)
    (tmp_path / "rows").write_text(content + '\n{"a": 1}\n')
    assert files.read_rows(tmp_path / "rows") == [{"a": 1}]


def test_what_is_no_file_is_refused_and_never_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder").mkdir()
    for name, what in (("fifo", "it is a FIFO"), ("folder", "it is a folder")):
        for read in (files.read_json, files.read_rows, files.read_whole):
            with pytest.raises(ValueError, match=f"{tmp_path / name} cannot be read: {what}"):
                read(tmp_path / name)
        with pytest.raises(OSError, match=what):
            files.sha256_of(tmp_path / name)
    with pytest.raises(OSError, match="No such device"):  # a FIFO without a reader
        files.open_to_append(tmp_path / "fifo")
    (tmp_path / "large").touch()
    os.truncate(tmp_path / "large", 300_000_000)
    with pytest.raises(ValueError, match="large cannot be read: it has 300,000,000 bytes"):
        files.read_json(tmp_path / "large")


@pytest.mark.parametrize("temporary", [False, True], ids=["the file", "its temporary file"])
def test_nothing_is_written_through_a_link(tmp_path: Path, temporary: bool) -> None:
    outside, path = tmp_path / "outside", tmp_path / "run" / "value.json"
    outside.write_text("mine")
    path.parent.mkdir()
    link = path.with_name(f".value.json.{os.getpid()}.tmp") if temporary else path
    link.symlink_to(outside)
    files.atomic_write_text(path, "new")
    assert (outside.read_text(), path.read_text(), path.is_symlink()) == ("mine", "new", False)


def test_logs_and_marks_do_not_follow_links(tmp_path: Path) -> None:
    outside, link = tmp_path / "outside", tmp_path / "link"
    outside.write_text("mine")
    link.symlink_to(outside)
    for write in (files.open_to_append, files.touch):
        with pytest.raises(OSError, match="it is a link, and links are not written through; remove it"):
            write(link)
    (tmp_path / "dangling").symlink_to(tmp_path / "made")
    with pytest.raises(OSError, match="it is a link"):
        files.touch(tmp_path / "dangling")
    assert outside.read_text() == "mine"
    assert not (tmp_path / "made").exists()


def test_folders_of_a_run_are_not_links(tmp_path: Path) -> None:
    run, outside = tmp_path / "run", tmp_path / "outside"
    for folder in (run, outside):
        folder.mkdir()
    (run / "recipe.yaml").touch()
    (run / "keep-0.1").symlink_to(outside)
    with pytest.raises(ValueError, match=f"{run}/keep-0.1 is a link, and what is written there would leave the run"):
        files.make_folder(run / "keep-0.1" / "prune")
    assert not list(outside.iterdir())
    (tmp_path / "elsewhere").symlink_to(run)  # the run itself may be reached by one
    files.make_folder(tmp_path / "elsewhere" / "pretrain")
    assert (run / "pretrain").is_dir()


def test_missing_json_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{tmp_path / 'absent'} does not exist"):
        files.read_json(tmp_path / "absent")
    with pytest.raises(ValueError, match=f"{tmp_path} cannot be read: "):
        files.read_json(tmp_path)


def test_sha256(tmp_path: Path) -> None:
    data = json.dumps(list(range(100_000))).encode()
    (tmp_path / "data").write_bytes(data)
    assert files.sha256_of(tmp_path / "data") == hashlib.sha256(data).hexdigest()
