"""`python -m launch` in processes of their own, for tests: started, waited for with a deadline, and all that they
started accounted for."""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]
INSTALLED = Path(sys.executable).parent / "hydra-pipeline"
MARK = "HYDRA_TEST_COMMAND"
SHARED_MEMORY = Path("/dev/shm")
END_S = 30
"""How long what a command started may outlive it."""


def marked(wanted: Mapping[str, str | None]) -> list[psutil.Process]:
    """Living processes with these values in their environment (None: without it), which orphans keep too. This process
    is left out."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.pid == os.getpid():
                continue
            environment = process.environ()
            if any(environment.get(name) != value for name, value in wanted.items()):
                continue
            if process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def wait_for_end(living: Callable[[], list[psutil.Process]], deadline_s: float) -> list[str]:
    """Wait until `living()` is empty; returns the command lines of those that stayed, which are then killed."""
    try:
        wait_until(lambda: not living(), deadline_s, "the end of all processes")
    except TimeoutError:
        return [said for process in living() if (said := _killed(process))]
    return []


def _killed(process: psutil.Process) -> str | None:
    try:
        said = f"{process.pid}: {' '.join(process.cmdline())}"
        process.kill()
    except psutil.NoSuchProcess:
        return None
    return said


def wait_until(condition: Callable[[], bool], deadline_s: float, what: str, every_s: float | None = None) -> None:
    """Return once `condition()` holds. Errors: TimeoutError naming `what`.

    It is asked every `every_s`; or every tenth of a second, and less and less often, as it may take a while to answer.
    """
    began, pause = time.monotonic(), threading.Event()
    while not condition():
        waited = time.monotonic() - began
        if waited > deadline_s:
            raise TimeoutError(f"not within {deadline_s} s: {what}")
        pause.wait(every_s if every_s is not None else min(max(0.1, waited / 50), 0.5))


def _unused_shared_memory(since: float) -> set[str]:
    """Files in shared memory that were made at or after a time and that no living process has mapped."""
    names = set()
    for path in SHARED_MEMORY.iterdir():
        with suppress(FileNotFoundError):
            if path.stat().st_ctime >= since:
                names.add(path.name)
    for maps in Path("/proc").glob("[0-9]*/maps"):
        try:
            text = maps.read_text()
        except OSError:
            continue
        names -= {name for name in names if str(SHARED_MEMORY / name) in text}
    return names


def _hear_ctrl_c() -> None:
    """A shell has its background jobs ignore it, tests begun by one included, and children inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@cache
def require_installed() -> None:
    """The command runs in another folder, where Python finds the installed project: it must be this checkout."""
    try:
        installed = json.loads(distribution("hydra-pipeline").read_text("direct_url.json") or "{}").get("url")
    except PackageNotFoundError:
        installed = None
    assert installed == ROOT.as_uri(), f"{sys.prefix} has {installed} installed, not {ROOT}; run: make setup"


@dataclass(frozen=True)
class Finished:
    code: int
    out: str
    err: str


class Command:
    """`python -m MODULE ARGUMENTS` in the folder `place`, from its start to the end of its last descendant. Without a
    module it is the installed command, `hydra-pipeline ARGUMENTS`."""

    def __init__(self, place: Path, *arguments: str, module: str | None = "launch") -> None:
        self._value = secrets.token_hex(8)
        self._started = time.time()
        self._streams = [place / f".{self._value}.{name}" for name in ("out", "err")]
        require_installed()
        environment = {**os.environ, MARK: self._value}
        environment.pop("PYTHONPATH", None)  # what is started must find the project because it is installed
        program = [str(INSTALLED)] if module is None else [sys.executable, "-m", module]
        with self._streams[0].open("w") as out, self._streams[1].open("w") as err:
            self.process = subprocess.Popen(
                [*program, *arguments],
                cwd=place,
                env=environment,
                stdout=out,
                stderr=err,
                preexec_fn=_hear_ctrl_c,
            )

    @property
    def pid(self) -> int:
        return self.process.pid

    def family(self) -> list[psutil.Process]:
        """Itself and all living processes that it started. Jobs that it submitted are SLURM's, which hands them the
        environment of whoever submits."""
        return marked({MARK: self._value, "SLURM_JOB_ID": os.environ.get("SLURM_JOB_ID")})

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def finish(self, deadline_s: float) -> Finished:
        """Wait for its end. Errors: TimeoutError; AssertionError if it left processes or shared memory behind."""
        try:
            self.process.wait(deadline_s)
        except subprocess.TimeoutExpired:
            self.kill()
            raise TimeoutError(f"{self.process.args} did not end within {deadline_s} s:\n{self.said()}") from None
        left = wait_for_end(self.family, END_S)
        assert not left, f"{self.process.args} left behind: {left}\n{self.said()}"
        # Waited for, as other programs of the machine have files there too, for moments.
        wait_until(lambda: not _unused_shared_memory(self._started), END_S, "shared memory as clean as before")
        return Finished(self.process.returncode, *(path.read_text() for path in self._streams))

    def kill(self) -> None:
        """End whatever of it still lives."""
        for process in self.family():
            _killed(process)
        self.process.wait()

    def said(self) -> str:
        """What it has printed so far."""
        return "\n".join(path.read_text() for path in self._streams)


def launch(place: Path, *arguments: str, module: str | None = "launch", deadline_s: float = 180) -> Finished:
    """Run one command to its end. It takes seconds, but may get a tenth of a processor."""
    return Command(place, *arguments, module=module).finish(deadline_s)
