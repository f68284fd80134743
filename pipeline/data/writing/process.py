"""Running the writer as a process that is watched: it ends, it fails with one reason, or it is ended.

FFCV's writer waits for ever if one of its workers fails, and such a worker may be killed, stopped or stuck on a dead
file system. So it runs in a process group of its own that reports progress through a pipe. Every member holds the pipe
or the log open, so both being closed is the proof that all are gone; Python's resource tracker is the last of them, and
takes their shared memory along.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pipeline.data.manifest import DataError, manifest_path

LOOK_SECONDS = 0.5
"""How often the writer's exit status is looked at."""
ENDING_SECONDS = 10.0
"""How long a group has to end after each signal."""
UNCOUNTED_SECONDS = 3600.0
UNCOUNTED_STAGES = (" list", " flush")
"""Stages that cannot tell how far they are: a million files are listed, the kernel writes out a whole file."""
LOG_BYTES = 1 << 16


class WriteError(RuntimeError):
    """A file could not be written although its source is good: full disk, killed process, stuck file system."""


@dataclass(frozen=True)
class SplitJob:
    """One file to write: the split, the temporary file, and the listing that the caller saw."""

    split: str
    temporary: str
    source_sha256: str


@dataclass(frozen=True)
class WriteJob:
    """All that the writer process is told."""

    dataset: str
    source: str | None
    classes: list[str]
    extra: str | None
    splits: list[SplitJob]
    workers: int
    max_resolution: int
    jpeg_quality: int
    skip_broken: bool
    parent: int
    """Process that waits for the writer; the writer ends when it is gone."""


@dataclass
class _Watch:
    """What is known of the running writer."""

    stage: str = "start"
    done: int = 0
    since: float = field(default_factory=time.monotonic)
    failure: dict[str, str] | None = None
    log: bytes = b""
    partial: bytes = b""


def remove_temporary(temporary: Path) -> None:
    """Delete a temporary FFCV file with all that lies beside it."""
    manifest = manifest_path(temporary)
    for path in (temporary, manifest, *manifest.parent.glob(f".{manifest.name}.*.tmp")):
        path.unlink(missing_ok=True)


def run_watched(
    job: WriteJob,
    stall_seconds: float,
    progress: Callable[[str, int, int], None],
    on_ready: Callable[[str], None],
) -> None:
    """Run the writer; call on_ready(split) when a split's temporary file and manifest are complete and on disk.

    Errors: DataError for what is wrong with the source, WriteError for everything else. Whatever happens, no process of
    the group is left. The deadline is `stall_seconds` without progress.
    """
    report_end, writer_end = os.pipe()
    command = [sys.executable, "-m", "pipeline.data.writing.worker", str(writer_end), json.dumps(asdict(job))]
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        pass_fds=[writer_end],
        start_new_session=True,
        env=_environment(),
    )
    os.close(writer_end)
    assert process.stdout is not None
    watch = _Watch()
    with selectors.DefaultSelector() as selector, process.stdout, os.fdopen(report_end, "rb") as report:
        selector.register(report, selectors.EVENT_READ)
        selector.register(process.stdout, selectors.EVENT_READ)
        try:
            while selector.get_map() and not _has_died(process):
                for message in _read(selector, report.fileno(), watch, LOOK_SECONDS):
                    _take(message, watch, progress, on_ready)
                allowed = UNCOUNTED_SECONDS if watch.stage.endswith(UNCOUNTED_STAGES) else stall_seconds
                if time.monotonic() - watch.since > allowed:
                    raise WriteError(
                        f"the writer made no progress for {allowed:.0f} seconds while in stage {watch.stage!r} "
                        f"({watch.done} done) and was ended; is a disk or a network file system stuck?"
                    )
        finally:
            messages = _end(process, selector, report.fileno(), watch)
        for message in messages:
            _take(message, watch, progress, on_ready)
    _raise_failure(process.returncode, watch)


def _environment() -> dict[str, str]:
    return {
        **os.environ,
        "NUMBA_DISABLE_JIT": "1",  # importing ffcv would compile for seconds what writing never calls
        "OMP_NUM_THREADS": "1",  # the writer forks; the fewer threads it has by then, the better
        "OPENBLAS_NUM_THREADS": "1",
        "TQDM_DISABLE": "1",
    }


def _has_died(process: subprocess.Popen[bytes]) -> bool:
    """Without collecting it: its number must not be given to another process while its group may still be signalled."""
    return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _read(selector: selectors.BaseSelector, report: int, watch: _Watch, timeout: float) -> list[dict[str, Any]]:
    """Take what the group wrote: keep the end of its log, return whole messages, forget closed ends."""
    messages = []
    for key, _ in selector.select(timeout):
        data = os.read(key.fd, 1 << 16)
        if not data:
            selector.unregister(key.fileobj)
        elif key.fd == report:
            *lines, watch.partial = (watch.partial + data).split(b"\n")
            messages.extend(json.loads(line) for line in lines)
        else:
            watch.log = (watch.log + data)[-LOG_BYTES:]
    return messages


def _take(
    message: dict[str, Any],
    watch: _Watch,
    progress: Callable[[str, int, int], None],
    on_ready: Callable[[str], None],
) -> None:
    if "failed" in message:
        watch.failure = message
    elif "ready" in message:
        on_ready(message["ready"])
    else:
        if (message["stage"], message["done"]) != (watch.stage, watch.done):
            watch.stage, watch.done, watch.since = message["stage"], message["done"], time.monotonic()
        progress(message["stage"], message["done"], message["total"])


def _end(
    process: subprocess.Popen[bytes], selector: selectors.BaseSelector, report: int, watch: _Watch
) -> list[dict[str, Any]]:
    """Wait until every process of the group is gone, ending those that are not; return the messages still in the pipe.

    SIGTERM comes first because the resource tracker ignores it and stays to remove shared memory; SIGCONT lets stopped
    processes receive it. A writer that has ended well has no group left to signal.
    """
    messages = []
    for signals in ((signal.SIGTERM, signal.SIGCONT), (signal.SIGKILL,)):
        for number in signals:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)
        deadline = time.monotonic() + ENDING_SECONDS
        while selector.get_map() and time.monotonic() < deadline:
            messages += _read(selector, report, watch, LOOK_SECONDS)
    process.wait(timeout=ENDING_SECONDS)
    return messages


def _raise_failure(returncode: int, watch: _Watch) -> None:
    if watch.failure is not None:
        reason = watch.failure["failed"]
        if watch.failure["kind"] == "data":
            raise DataError(reason)
        raise WriteError(f"{reason}{_first_error(watch.log)}")
    if returncode < 0:
        raise WriteError(
            f"the writer was killed by {signal.Signals(-returncode).name} in stage {watch.stage!r}; SIGKILL often "
            f"means that memory ran out: use fewer --workers{_first_error(watch.log)}"
        )
    if returncode > 0:
        raise WriteError(f"the writer failed in stage {watch.stage!r}{_first_error(watch.log)}")


def _first_error(log: bytes) -> str:
    """What the first traceback in the log ends with; later ones are its consequences."""
    errors = re.findall(r"^[A-Za-z_][\w.]*: \S.*", log.decode("utf-8", "replace"), re.MULTILINE)
    return f": {errors[0]}" if errors else ""
