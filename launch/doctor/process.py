"""One check in a process of its own: it may crash, hang or change its environment without harm to the others.

`run_check` waits for it, with a deadline. `main` is the process: it reads a Subject from standard input, reports
through a pipe, and ends with the process that started it, when standard input ends.
"""

from __future__ import annotations

import importlib
import json
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from typing import Any

from launch.doctor.outcome import Check, Outcome, ProgressCallback, Subject

POLL_S = 0.5
END_S = 5.0
"""How long an ending process may take; one that waits for a dead file system cannot be killed, and is left."""
LOG_BYTES = 1 << 14


def run_check(check: Check, subject: Subject, progress: ProgressCallback) -> Outcome:
    """The outcome of one check; a failure that says so if it crashes, or passes its deadline. No error is raised."""
    report_end, child_end = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-m", "launch.doctor.process", check.function, str(child_end)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        pass_fds=[child_end],
        start_new_session=True,
    )
    os.close(child_end)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        with suppress(BrokenPipeError):  # its end is reported below
            process.stdin.write(json.dumps(subject.to_json()).encode() + b"\n")
            process.stdin.flush()
        return _outcome(check, process, report_end, process.stdout.fileno(), progress)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        with suppress(BrokenPipeError):
            process.stdin.close()
        process.stdout.close()
        os.close(report_end)
        with suppress(subprocess.TimeoutExpired):
            process.wait(END_S)


def _outcome(
    check: Check, process: subprocess.Popen[bytes], report: int, output: int, progress: ProgressCallback
) -> Outcome:
    log, partial, last_done = b"", b"", -1
    deadline = time.monotonic() + check.deadline_s
    with selectors.DefaultSelector() as selector:
        selector.register(report, selectors.EVENT_READ)
        selector.register(output, selectors.EVENT_READ)
        while report in selector.get_map():
            for key, _ in selector.select(POLL_S):
                data = os.read(key.fd, 1 << 16)
                if not data:
                    selector.unregister(key.fd)
                elif key.fd == output:
                    log = (log + data)[-LOG_BYTES:]
                else:
                    *lines, partial = (partial + data).split(b"\n")
                    for message in map(json.loads, lines):
                        if "status" in message:
                            return Outcome(**message)
                        progress(message["done"], message["total"])
                        if message["done"] > last_done:
                            last_done, deadline = message["done"], time.monotonic() + check.deadline_s
            if time.monotonic() > deadline:
                seconds = f"{check.deadline_s:g} s"
                return Outcome("fail", f"no answer in {seconds}", "is the machine overloaded, or a file system stuck?")
    return Outcome("fail", f"its process {_end_of(process)}{_last_line(log)}")


def _end_of(process: subprocess.Popen[bytes]) -> str:
    try:
        code = process.wait(END_S)
    except subprocess.TimeoutExpired:
        return "ended without an answer"
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"


def _last_line(log: bytes) -> str:
    lines = log.decode("utf-8", "replace").split("\n")
    return next((f": {line.strip()}" for line in reversed(lines) if line.strip()), "")


def main(function: str, report: str) -> int:
    """The process of one check."""
    descriptor = int(report)
    os.set_inheritable(descriptor, False)

    def send(message: dict[str, Any]) -> None:
        os.write(descriptor, json.dumps(message).encode() + b"\n")

    def progress(done: int, total: int) -> None:
        send({"done": done, "total": total})

    line = sys.stdin.buffer.readline()
    threading.Thread(target=_end_with_parent, name="parent-watch", daemon=True).start()
    module, _, name = function.partition(":")
    try:
        subject = Subject(**json.loads(line))
        outcome = getattr(importlib.import_module(module), name)(subject, progress)
    except ValueError as error:  # of the project's own checks: it says what to do
        outcome = Outcome("fail", str(error))
    except Exception as error:  # whatever a package or the system raises is what the check has found
        outcome = Outcome("fail", f"{type(error).__name__}: {error}")
    send({"status": outcome.status, "text": outcome.text, "fix": outcome.fix})
    return 0


def _end_with_parent() -> None:
    os.read(0, 1)  # nothing more is written: it returns when the other end is closed
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
