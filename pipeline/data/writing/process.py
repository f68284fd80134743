"""Supervises the writer process: it finishes, fails with one reason, or is terminated.

FFCV's writer waits forever if one of its workers fails, and a worker can be killed, stopped or stuck on a dead file
system. So it runs in a process group of its own that reports progress through a pipe. Every process of the group holds
the pipe or the log open, so once both are closed all have ended; Python's resource tracker ends last, and removes their
shared memory.
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

POLL_SECONDS = 0.5
"""How often the writer's exit status is checked."""
SHUTDOWN_SECONDS = 10.0
"""How long the group has to end after each signal."""
UNCOUNTED_SECONDS = 3600.0
"""Deadline of stages that report no progress."""
UNCOUNTED_STAGES = (" list", " flush")
"""Stages that cannot report progress: one lists up to a million files, in the other the kernel writes out a file."""
LOG_BYTES = 1 << 16


class WriteError(RuntimeError):
    """A file could not be written although its source is valid: full disk, killed process, stuck file system."""


@dataclass(frozen=True)
class SplitJob:
    """One file to write: the split, the temporary file, and the hash of the source as the caller has listed it."""

    split: str
    temporary: str
    source_sha256: str


@dataclass(frozen=True)
class WriteJob:
    """The writer process's input."""

    dataset: str
    source: str | None
    classes: list[str]
    extra: str | None
    background: str | None
    exif_rotate: bool
    val_fraction: str | None
    splits: list[SplitJob]
    workers: int
    max_resolution: int
    jpeg_quality: int
    skip_broken: bool
    parent: int
    """The process that waits for the writer; the writer ends with it."""


@dataclass
class _WriterState:
    """The running writer's last report, and the end of its log."""

    stage: str = "start"
    done: int = 0
    last_progress: float = field(default_factory=time.monotonic)
    failure: dict[str, str] | None = None
    log: bytes = b""
    partial: bytes = b""


def remove_temporary(temporary: Path) -> None:
    """Delete a temporary FFCV file with its manifest and that manifest's temporary files."""
    manifest = manifest_path(temporary)
    for path in (temporary, manifest, *manifest.parent.glob(f".{manifest.name}.*.tmp")):
        path.unlink(missing_ok=True)


def run_writer(
    job: WriteJob,
    stall_seconds: float,
    progress: Callable[[str, int, int], None],
    on_ready: Callable[[str], None],
) -> None:
    """Run the writer; call on_ready(split) when a split's temporary file and manifest are complete and on disk.

    Errors: DataError for a bad source, WriteError for everything else, and for `stall_seconds` without progress. No
    process of the group outlives the call.
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
    state = _WriterState()
    with selectors.DefaultSelector() as selector, process.stdout, os.fdopen(report_end, "rb") as report:
        selector.register(report, selectors.EVENT_READ)
        selector.register(process.stdout, selectors.EVENT_READ)
        try:
            while selector.get_map() and not _has_exited(process):
                for message in _read_output(selector, report.fileno(), state, POLL_SECONDS):
                    _handle_message(message, state, progress, on_ready)
                deadline = UNCOUNTED_SECONDS if state.stage.endswith(UNCOUNTED_STAGES) else stall_seconds
                if time.monotonic() - state.last_progress > deadline:
                    raise WriteError(
                        f"the writer made no progress for {deadline:.0f} seconds while in stage {state.stage!r} "
                        f"({state.done} done) and was terminated; is a disk or a network file system stuck?"
                    )
        finally:
            messages = _end_group(process, selector, report.fileno(), state)
        for message in messages:
            _handle_message(message, state, progress, on_ready)
    _raise_failure(process.returncode, state)


def _environment() -> dict[str, str]:
    return {
        **os.environ,
        "NUMBA_DISABLE_JIT": "1",  # importing ffcv would spend seconds compiling what writing never calls
        "OMP_NUM_THREADS": "1",  # the writer forks, which is safest with few threads
        "OPENBLAS_NUM_THREADS": "1",
        "TQDM_DISABLE": "1",
    }


def _has_exited(process: subprocess.Popen[bytes]) -> bool:
    """Does not reap the process: its id must not be reused while its group may still be signalled."""
    return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _read_output(
    selector: selectors.BaseSelector, report: int, state: _WriterState, timeout: float
) -> list[dict[str, Any]]:
    """Read the group's output: returns complete messages, keeps the end of the log, unregisters closed pipes."""
    messages = []
    for key, _ in selector.select(timeout):
        data = os.read(key.fd, 1 << 16)
        if not data:
            selector.unregister(key.fileobj)
        elif key.fd == report:
            *lines, state.partial = (state.partial + data).split(b"\n")
            messages.extend(json.loads(line) for line in lines)
        else:
            state.log = (state.log + data)[-LOG_BYTES:]
    return messages


def _handle_message(
    message: dict[str, Any],
    state: _WriterState,
    progress: Callable[[str, int, int], None],
    on_ready: Callable[[str], None],
) -> None:
    if "failed" in message:
        state.failure = message
    elif "ready" in message:
        on_ready(message["ready"])
    else:
        if (message["stage"], message["done"]) != (state.stage, state.done):
            state.stage, state.done, state.last_progress = message["stage"], message["done"], time.monotonic()
        progress(message["stage"], message["done"], message["total"])


def _end_group(
    process: subprocess.Popen[bytes], selector: selectors.BaseSelector, report: int, state: _WriterState
) -> list[dict[str, Any]]:
    """Terminate the group and wait until every process has ended; returns the messages still in the pipe.

    SIGTERM comes first because the resource tracker ignores it and stays to remove shared memory; SIGCONT lets stopped
    processes receive it. A writer that has succeeded has no group left to signal.
    """
    messages = []
    for signals in ((signal.SIGTERM, signal.SIGCONT), (signal.SIGKILL,)):
        for number in signals:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)
        deadline = time.monotonic() + SHUTDOWN_SECONDS
        while selector.get_map() and time.monotonic() < deadline:
            messages += _read_output(selector, report, state, POLL_SECONDS)
    process.wait(timeout=SHUTDOWN_SECONDS)
    return messages


def _raise_failure(returncode: int, state: _WriterState) -> None:
    if state.failure is not None:
        reason = state.failure["failed"]
        if state.failure["kind"] == "data":
            raise DataError(reason)
        raise WriteError(f"{reason}{_first_error(state.log)}")
    if returncode < 0:
        raise WriteError(
            f"the writer was killed by {signal.Signals(-returncode).name} in stage {state.stage!r}; SIGKILL often "
            f"means that memory ran out: use fewer --workers{_first_error(state.log)}"
        )
    if returncode > 0:
        raise WriteError(f"the writer failed in stage {state.stage!r}{_first_error(state.log)}")


def _first_error(log: bytes) -> str:
    """The last line of the first traceback in the log; later ones are its consequences."""
    errors = re.findall(r"^[A-Za-z_][\w.]*: \S.*", log.decode("utf-8", "replace"), re.MULTILINE)
    return f": {errors[0]}" if errors else ""
