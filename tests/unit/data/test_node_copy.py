"""Copies of data files on a node: exact, made once, never of another file; errors name the original."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import mmap
import os
import platform
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.data.loading import copy_file, node_copy
from pipeline.data.loading.loader import Loader
from pipeline.data.loading.node_copy import NodeCopyFailed, NodeCopyLoader, copy_to_node
from pipeline.data.loading.prefetch import LoaderError
from pipeline.data.manifest import DataError, check_structure, manifest_path, open_checked, read_index
from pipeline.distributed import Group
from pipeline.recipe.file import recipe_hash
from pipeline.recipe.schema import RecipeError
from pipeline.run.stop import StopRequested
from pipeline.training.context import RunContext
from tests.support.commands import ROOT, wait_until
from tests.support.small_recipe import small_recipe
from tests.unit.data.test_manifest import build_file, overwrite

PAGE = 512
DEADLINE_S = 60
SIDE = 10


@pytest.fixture(autouse=True)
def small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of a few kilobytes have several pages."""
    for module in ("manifest", "writing.verify", "loading.copy_file"):
        monkeypatch.setattr(f"pipeline.data.{module}.HASH_PAGE_BYTES", PAGE)


@pytest.fixture
def original(tmp_path: Path) -> Path:
    (tmp_path / "server").mkdir()
    path = build_file(tmp_path / "server" / "train.beton")
    assert len(open_checked(path).pages) > 5
    return path


@pytest.fixture
def scratch(tmp_path: Path) -> Path:
    return tmp_path / "local" / "scratch"


def private(scratch: Path) -> Path:
    return scratch / f"hydra-{os.geteuid()}"


def names(scratch: Path) -> set[str]:
    """Files in the user's folder, without the lock."""
    return {path.name for path in private(scratch).iterdir()} - {"lock"}


def same_file(a: Path, b: Path) -> bool:
    return a.read_bytes() == b.read_bytes() and open_checked(a) == open_checked(b)


@pytest.fixture
def copyings(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The original of every copy that was started."""
    originals: list[Path] = []

    def record_and_copy(path: Path, *rest: Any) -> None:
        originals.append(path)
        copy_file.copy_verified(path, *rest)

    monkeypatch.setattr(node_copy, "copy_verified", record_and_copy)
    return originals


def test_a_copy_is_the_file_and_the_next_job_uses_it(original: Path, scratch: Path, copyings: list[Path]) -> None:
    lines: list[str] = []
    copy = copy_to_node(original, scratch, lines.append)
    assert same_file(copy, original)
    assert copy.parent == private(scratch)
    assert private(scratch).stat().st_mode & 0o777 == 0o700
    assert names(scratch) == {copy.name, manifest_path(copy).name}
    assert open_checked(original).sha256[:16] in copy.name
    pages, size = len(open_checked(original).pages), original.stat().st_size
    assert len(set(lines)) == pages + 1
    assert lines[-1] == f"pid {os.getpid()} on {platform.node()}, copying {original}: {size} of {size} bytes"
    assert copy_to_node(original, scratch) == copy
    assert copyings == [original]


def cached_share(path: Path) -> float:
    """The share of a file's pages that are in the page cache."""
    libc = ctypes.CDLL(None, use_errno=True)
    with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, prot=mmap.PROT_READ) as pages:
        flags = np.zeros(-(-len(pages) // mmap.PAGESIZE), np.uint8)
        content = np.frombuffer(pages, np.uint8)  # references the mapping, which cannot be closed before it is deleted
        start = ctypes.c_void_p(content.ctypes.data)
        code = libc.mincore(start, ctypes.c_size_t(len(pages)), ctypes.c_void_p(flags.ctypes.data))
        assert code == 0, os.strerror(ctypes.get_errno())
        del content
    return float((flags & 1).mean())


def test_a_copy_is_cached_and_reuse_reads_it_ahead(tmp_path: Path, scratch: Path, copyings: list[Path]) -> None:
    original = build_file(tmp_path / "train.beton", height=500, width=600)  # more than Linux reads ahead by itself
    copy = copy_to_node(original, scratch)
    assert cached_share(copy) == 1.0
    with copy.open("rb") as stream:
        os.fsync(stream.fileno())
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if cached_share(copy) == 1.0:
        pytest.skip("this file system ignores requests to drop files from memory")
    assert copy_to_node(original, scratch) == copy
    assert copyings == [original]
    wait_until(lambda: cached_share(copy) == 1.0, 20, "the copy to be read ahead")


def test_another_file_of_the_same_name_has_its_own_copy(original: Path, scratch: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    other = build_file(tmp_path / "other" / original.name, seed=1)
    copies = [copy_to_node(path, scratch) for path in (original, other)]
    assert same_file(copies[0], original)
    assert same_file(copies[1], other)
    assert not same_file(*copies)


def damage_index(copy: Path) -> None:
    overwrite(copy, check_structure(copy).alloc_table_ptr + 16, b"\x00")


def truncate(copy: Path) -> None:
    os.truncate(copy, copy.stat().st_size - 1)


def lose_manifest(copy: Path) -> None:
    manifest_path(copy).unlink()


def change_manifest(copy: Path) -> None:
    values = json.loads(manifest_path(copy).read_text())
    manifest_path(copy).write_text(json.dumps({**values, "sha256": "0" * 64}))


def link_elsewhere(copy: Path) -> None:
    copy.rename(copy.parent.parent / "elsewhere")
    copy.symlink_to(copy.parent.parent / "elsewhere")


@pytest.mark.parametrize("spoil", [damage_index, truncate, lose_manifest, change_manifest, link_elsewhere, Path.unlink])
def test_a_copy_that_differs_from_the_file_is_replaced(
    original: Path, scratch: Path, copyings: list[Path], spoil: Callable[[Path], None]
) -> None:
    copy = copy_to_node(original, scratch)
    spoil(copy)
    assert copy_to_node(original, scratch) == copy
    assert same_file(copy, original)
    assert not copy.is_symlink()
    assert copyings == [original] * 2


def test_another_users_copy_is_not_used(original: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy, manifest = copy_to_node(original, scratch), open_checked(original)
    assert node_copy._is_usable(copy, manifest)
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    assert not node_copy._is_usable(copy, manifest)


def as_a_link(folder: Path) -> None:
    (folder.parent / "theirs").mkdir()
    folder.symlink_to(folder.parent / "theirs")


def open_to_all(folder: Path) -> None:
    folder.mkdir()
    folder.chmod(0o777)


@pytest.mark.parametrize("prepare", [as_a_link, open_to_all])
def test_a_folder_that_others_could_write_to_is_refused(
    original: Path, scratch: Path, prepare: Callable[[Path], None]
) -> None:
    scratch.mkdir(parents=True)
    prepare(private(scratch))
    with pytest.raises(DataError, match=r"hydra-\d+ on .* is not a folder that only user \d+ writes to; remove it"):
        copy_to_node(original, scratch)
    assert names(scratch) == set()


def test_a_folder_of_another_user_is_refused(original: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (scratch / "hydra-12345").mkdir(parents=True, mode=0o700)
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.raises(DataError, match="is not a folder that only user 12345 writes to"):
        copy_to_node(original, scratch)


def test_a_folder_that_cannot_be_created_is_named(original: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=f"data.stage_to = {tmp_path}/file/x cannot be used on {platform.node()}"):
        copy_to_node(original, tmp_path / "file" / "x")


def test_a_damaged_original_is_named_and_leaves_nothing(original: Path, scratch: Path) -> None:
    structure = check_structure(original)
    for offset in read_index(original, structure).samples["data_ptr"].tolist():
        (before,) = original.read_bytes()[offset : offset + 1]
        overwrite(original, offset, bytes([before ^ 1]))
        open_checked(original)  # does not detect it
        with pytest.raises(DataError, match=f"{original} is damaged: its 8 MiB page {offset // PAGE} differs"):
            copy_to_node(original, scratch)
        assert names(scratch) == set()
        overwrite(original, offset, bytes([before]))
    copy_to_node(original, scratch)


def test_without_space_no_copy_is_started(
    original: Path, scratch: Path, copyings: list[Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "other").mkdir()
    other_copy = copy_to_node(build_file(tmp_path / "other" / original.name, seed=1), scratch)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=node_copy.MARGIN_BYTES + PAGE))
    with pytest.raises(DataError) as caught:
        copy_to_node(original, scratch)
    assert f"{original} (" in str(caught.value)
    for words in (f"on {platform.node()}, where 67.1 MB is free", other_copy.name, "set data.stage_to=null"):
        assert words in str(caught.value)
    assert original not in copyings
    assert names(scratch) == {other_copy.name, manifest_path(other_copy).name}
    # Some file systems report no usage.
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(total=0, free=0))
    assert same_file(copy_to_node(original, scratch), original)


@pytest.mark.parametrize(
    ("code", "kind", "words"),
    [
        (errno.ENOSPC, DataError, "does not fit into"),
        (errno.EDQUOT, DataError, "does not fit into"),
        (errno.EIO, NodeCopyFailed, "was not copied to .*Input/output error"),
    ],
)
@pytest.mark.parametrize("call", ["pwrite", "fsync", "replace", "pread"])
def test_a_disk_that_fails_leaves_nothing(
    original: Path,
    scratch: Path,
    monkeypatch: pytest.MonkeyPatch,
    call: str,
    code: int,
    kind: type[Exception],
    words: str,
) -> None:
    """Each call of this kind in turn."""
    real = getattr(os, call)
    calls: list[int] = []

    def failing_at(number: int) -> Callable[..., Any]:
        calls.clear()

        def call_or_fail(*arguments: Any) -> Any:
            calls.append(len(calls))
            if calls[-1] == number:
                raise OSError(code, os.strerror(code))
            return real(*arguments)

        return call_or_fail

    monkeypatch.setattr(os, call, failing_at(-1))
    copy_to_node(original, scratch)
    total = len(calls)
    assert total > 1
    for number in range(total):
        shutil.rmtree(private(scratch))
        monkeypatch.setattr(os, call, failing_at(number))
        with pytest.raises(kind, match=words) as caught:
            copy_to_node(original, scratch)
        assert str(original) in str(caught.value)
        assert not any(name.endswith(".tmp") for name in names(scratch))
        monkeypatch.setattr(os, call, real)
        assert same_file(copy_to_node(original, scratch), original)


def test_leftovers_of_dead_processes_of_this_host_are_removed(original: Path, scratch: Path) -> None:
    ours = private(scratch)
    ours.mkdir(parents=True, mode=0o700)
    leftovers = [f"x-00.beton.{platform.node()}.1.tmp", ".x-00.beton.manifest.json.1.tmp"]
    others = ["x-00.beton.another-host.1.tmp", "notes.txt"]
    for name in leftovers + others:
        (ours / name).touch()
    copy = copy_to_node(original, scratch)
    assert names(scratch) == {copy.name, manifest_path(copy).name, *others}


def test_a_callback_that_raises_cancels_the_copy(original: Path, scratch: Path) -> None:
    count = iter(range(100))

    def interrupt(status: str) -> None:
        if next(count) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        copy_to_node(original, scratch, interrupt)
    assert names(scratch) == set()


@contextmanager
def paused_copy(original: Path, scratch: Path) -> Iterator[tuple[Future[Path], threading.Event]]:
    """A copy that has started and continues when the event is set."""
    started, go = threading.Event(), threading.Event()

    def wait_for_go(status: str) -> None:
        started.set()
        assert go.wait(DEADLINE_S)

    with ThreadPoolExecutor(1) as pool:
        copying = pool.submit(copy_to_node, original, scratch, wait_for_go)
        assert started.wait(DEADLINE_S)
        try:
            yield copying, go
        finally:
            go.set()


def test_one_process_copies_and_the_others_wait(original: Path, scratch: Path, copyings: list[Path]) -> None:
    waiting = threading.Event()

    def notice_holder(status: str) -> None:
        if status.startswith(f"pid {os.getpid()} on {platform.node()}, copying {original}: 0 of "):
            waiting.set()

    with paused_copy(original, scratch) as (copying, go), ThreadPoolExecutor(2) as pool:
        others = [pool.submit(copy_to_node, original, scratch, notice_holder) for _ in range(2)]
        assert waiting.wait(DEADLINE_S)  # their status names the process that copies
        assert not any(other.done() for other in others)
        go.set()
        assert {other.result(DEADLINE_S) for other in others} == {copying.result(DEADLINE_S)}
    assert copyings == [original]


def test_a_waiting_process_gives_up_on_one_that_hangs_and_names_it(
    original: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node_copy, "STALL_S", 0.5)
    with paused_copy(original, scratch) as (copying, go):
        with pytest.raises(NodeCopyFailed) as caught:
            copy_to_node(original, scratch)
        go.set()
        assert same_file(copying.result(DEADLINE_S), original)
    holder = f"pid {os.getpid()} on {platform.node()}, copying {original}: 0 of {original.stat().st_size} bytes"
    assert holder in str(caught.value)


def test_a_slow_copy_is_waited_for(original: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes four times the deadline in all, but its status changes within each."""
    clock = [0.0]
    monkeypatch.setattr(node_copy, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    statuses = [f"step {number}\n" for number in range(5)]
    private(scratch).mkdir(parents=True, mode=0o700)
    with ExitStack() as stack:
        lock = stack.enter_context((private(scratch) / "lock").open("w"))
        fcntl.flock(lock, fcntl.LOCK_EX)
        lines: list[str] = []

        def advance(status: str) -> None:
            lines.append(status)
            if len(lines) % 2:
                return  # the status is new: the clock advances at the next call
            clock[0] += 0.9 * node_copy.STALL_S
            if statuses:
                lock.seek(0)
                lock.write(statuses.pop(0))
                lock.flush()
            else:
                fcntl.flock(lock, fcntl.LOCK_UN)

        assert same_file(copy_to_node(original, scratch, advance), original)
    assert clock[0] > 4 * node_copy.STALL_S


KILLED_HALF_WAY = """
import sys
from pathlib import Path
from pipeline.data import manifest
from pipeline.data.loading import copy_file, node_copy

manifest.HASH_PAGE_BYTES = copy_file.HASH_PAGE_BYTES = int(sys.argv[3])

def pause_half_way(status, lines=[]):
    lines.append(status)
    if len(lines) == 5:
        print("half", flush=True)
        sys.stdin.read()

node_copy.copy_to_node(Path(sys.argv[1]), Path(sys.argv[2]), pause_half_way)
"""


@pytest.mark.slow
def test_after_a_killed_process_the_next_one_copies(original: Path, scratch: Path, copyings: list[Path]) -> None:
    command = [sys.executable, "-c", KILLED_HALF_WAY, str(original), str(scratch), str(PAGE)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as copier:
        assert copier.stdout is not None
        assert copier.stdout.readline() == "half\n"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(node_copy, "STALL_S", 0.3)
            with pytest.raises(NodeCopyFailed, match=f"pid {copier.pid} on "):
                copy_to_node(original, scratch)
        copier.send_signal(signal.SIGKILL)
    (leftover,) = names(scratch)
    assert leftover.endswith(f".{platform.node()}.{copier.pid}.tmp")
    copy = copy_to_node(original, scratch)
    assert same_file(copy, original)
    assert names(scratch) == {copy.name, manifest_path(copy).name}
    assert copyings == [original]


def crops(count: int) -> np.ndarray:
    return np.tile(np.array([0, 0, SIDE, SIDE, 0], np.int32), (count, 1))


def test_a_loader_of_a_copy_reads_the_copy_and_names_the_original(original: Path, scratch: Path) -> None:
    copy = copy_to_node(original, scratch)
    ids = np.arange(6)
    with Loader(original, image_size=SIDE, threads=1) as direct:
        expected = direct.read(ids, crops(6)).images
    structure = check_structure(original)
    for i in (4, 0):  # damages the original after it was copied
        overwrite(original, int(read_index(original, structure).samples["data_ptr"][i]), b"\x55" * 40)
    with NodeCopyLoader(original, copy, image_size=SIDE, threads=1) as loader:
        assert torch.equal(loader.read(ids, crops(6)).images, expected)
        assert loader.path == original


def test_a_damaged_copy_is_removed_and_copied_again(original: Path, scratch: Path) -> None:
    copy = copy_to_node(original, scratch)
    overwrite(copy, int(read_index(copy, check_structure(copy)).samples["data_ptr"][1]) + 30, b"\x01\x02\x03")
    assert copy_to_node(original, scratch) == copy  # its images are not read again
    with NodeCopyLoader(original, copy, image_size=SIDE, threads=1) as loader:
        loader.read(np.array([0, 2, 3]), crops(3))
        with pytest.raises(LoaderError) as caught:
            list(loader.batches([(np.array([0, 1]), crops(2))]))
    assert str(caught.value).startswith(f"{original}: its copy {copy} on {platform.node()} was damaged (sample 1: ")
    assert caught.value.__cause__ is None  # a ValueError there would end the run
    assert names(scratch) == set()
    assert same_file(copy_to_node(original, scratch), original)


# --- together with the other workers ---------------------------------------------------------------------------------


class Exchange:
    """What two ranks, in two threads, exchange."""

    def __init__(self) -> None:
        self.values: list[Any] = [None, None]
        self.barrier = threading.Barrier(2, timeout=DEADLINE_S)


@dataclass(frozen=True)
class Rank(Group):
    exchange: Exchange = field(default_factory=Exchange)

    def gather(self, value: Any) -> list[Any]:
        self.exchange.values[self.rank] = value
        self.barrier()
        values = list(self.exchange.values)
        self.barrier()
        return values

    def barrier(self) -> None:
        self.exchange.barrier.wait()


def context_of(folder: Path, scratch: Path | None, group: Group, **more: Any) -> RunContext:
    data = {"image_size": SIDE, "stage_to": str(scratch) if scratch else None}
    return RunContext(small_recipe(folder, data=data, model={"num_classes": 2}), folder, "token", group, **more)


def single_group() -> Group:
    return Group(0, 1, torch.device("cpu"))


def test_a_worker_reads_the_copy_if_the_recipe_says_so(original: Path, scratch: Path) -> None:
    for where in (None, scratch):
        context = context_of(original.parent, where, single_group())
        loader = context.loader(str(original))
        assert loader is context.loader(str(original))
        assert isinstance(loader, NodeCopyLoader) == (where is not None)
        assert loader.path == original
        context.close()
    assert same_file(next(private(scratch).glob("*.beton")), original)


def two_contexts(original: Path, scratches: list[Path], **more: Any) -> list[RunContext]:
    exchange = Exchange()
    device = torch.device("cpu")
    return [context_of(original.parent, scratches[rank], Rank(rank, 2, device, exchange), **more) for rank in (0, 1)]


def outcomes(contexts: list[RunContext], path: Path) -> list[Path | BaseException]:
    """The path of the loader, or what `context.loader` raised, per rank."""
    with ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(context.loader, str(path)) for context in contexts]
        results = [future.exception(DEADLINE_S) or future.result().path for future in futures]
    for context in contexts:
        context.close()
    return results


def test_workers_wait_for_the_copies_of_all_nodes(
    original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While one node copies; without progress, nothing is reported to the watchdog."""
    scratches = [tmp_path / "node0", tmp_path / "node1"]
    events: list[tuple[str, dict[str, Any]]] = []
    events_at_round: list[int] = []
    quiet = threading.Event()
    gather = Rank.gather

    def gather_and_count(self: Rank, value: Any) -> list[Any]:
        events_at_round.append(len(events))
        last = events_at_round[-20:]
        if len(last) == 20 and 0 < last[0] == last[-1]:
            quiet.set()
        return gather(self, value)

    monkeypatch.setattr(Rank, "gather", gather_and_count)

    def observer(event: str, facts: dict[str, Any]) -> None:
        events.append((event, facts))

    contexts = two_contexts(original, scratches, observer=observer, staging_poll_s=0.05)
    with paused_copy(original, scratches[1]) as (_, go), ThreadPoolExecutor(1) as pool:
        both = pool.submit(outcomes, contexts, original)
        assert quiet.wait(DEADLINE_S)
        assert list(private(scratches[0]).glob("*.beton")), "the first node has its copy"
        assert not both.done()
        go.set()
        assert both.result(DEADLINE_S) == [original] * 2
    assert all(event == ("staging", {"stage": None}) for event in events)


def test_workers_fail_together(original: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for error in outcomes(two_contexts(original, [tmp_path / "node0", tmp_path / "file"]), original):
        assert isinstance(error, DataError)
        assert f"{platform.node()}: data.stage_to = {tmp_path}/file cannot be used" in str(error)


def test_an_error_that_a_restart_may_fix_is_not_a_data_error(
    original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing_copy(*_: Any) -> None:
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(node_copy, "copy_verified", failing_copy)
    for error in outcomes(two_contexts(original, [tmp_path / "node0", tmp_path / "node1"]), original):
        assert isinstance(error, NodeCopyFailed)
        assert f"{original} was not copied to" in str(error)


def test_a_run_can_be_stopped_while_it_waits_for_a_copy(original: Path, scratch: Path) -> None:
    stop = threading.Event()
    context = context_of(original.parent, scratch, single_group(), stop=stop.is_set)
    with paused_copy(original, scratch) as (copying, go), ThreadPoolExecutor(1) as pool:
        loading = pool.submit(context.loader, str(original))
        stop.set()
        assert isinstance(loading.exception(DEADLINE_S), StopRequested)
        assert not copying.done()
        go.set()
    context.close()


def test_the_recipe_key_changes_no_result_and_must_be_absolute(original: Path) -> None:
    def with_stage_to(value: str | None) -> str:
        return recipe_hash(small_recipe(original.parent, data={"stage_to": value}))

    assert with_stage_to("/local/scratch") == with_stage_to(None)
    with pytest.raises(RecipeError, match="stage_to scratch must begin with /"):
        with_stage_to("scratch")
