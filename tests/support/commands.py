"""Runs `python -m launch` in its own process: waits with a deadline, and checks that no descendant is left."""

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
"""How long a command's descendants may outlive it."""


def processes_with(variables: Mapping[str, str | None]) -> list[psutil.Process]:
    """Living processes, except this one, with these environment variables (None: unset), which orphans keep too."""
    processes = []
    for process in psutil.process_iter():
        try:
            if process.pid == os.getpid():
                continue
            environment = process.environ()
            if any(environment.get(name) != value for name, value in variables.items()):
                continue
            if process.status() != psutil.STATUS_ZOMBIE:
                processes.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return processes


def listening_addresses(process: psutil.Process) -> set[str]:
    """IP addresses at which a process accepts connections; none if it has ended. IPv4 in IPv6 is IPv4."""
    try:
        listening = [one for one in process.net_connections("inet") if one.status == psutil.CONN_LISTEN]
        return {one.laddr.ip.removeprefix("::ffff:") for one in listening}
    except psutil.NoSuchProcess:
        return set()


def wait_for_end(living: Callable[[], list[psutil.Process]], deadline_s: float) -> list[str]:
    """Wait until `living()` is empty; kills processes that remain at the deadline and returns their command lines."""
    try:
        wait_until(lambda: not living(), deadline_s, "the end of all processes")
    except TimeoutError:
        return [description for process in living() if (description := _kill_process(process))]
    return []


def _kill_process(process: psutil.Process) -> str | None:
    """Its pid and command line; None if it has already ended."""
    try:
        description = f"{process.pid}: {' '.join(process.cmdline())}"
        process.kill()
    except psutil.NoSuchProcess:
        return None
    return description


def wait_until(condition: Callable[[], bool], deadline_s: float, what: str, every_s: float | None = None) -> None:
    """Return once `condition()` holds. Errors: TimeoutError naming `what`.

    It is checked every `every_s`; by default first every 0.1 s, later less often, as a check may be slow.
    """
    start, pause = time.monotonic(), threading.Event()
    while not condition():
        elapsed = time.monotonic() - start
        if elapsed > deadline_s:
            raise TimeoutError(f"not within {deadline_s} s: {what}")
        pause.wait(every_s if every_s is not None else min(max(0.1, elapsed / 50), 0.5))


def _unused_shared_memory(since: float) -> set[str]:
    """Names of files in shared memory that are not older than `since` and that no living process has mapped."""
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


def _restore_sigint() -> None:
    """A shell makes its background jobs, such as tests started in one, ignore SIGINT, and children inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@cache
def require_installed() -> None:
    """Check that this checkout is installed: commands run in another folder, where Python imports the installed one."""
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
    """`python -m MODULE ARGUMENTS` in the folder `place`, from its start to the end of its last descendant. If `module`
    is None, the installed command `hydra-pipeline ARGUMENTS`."""

    def __init__(
        self, place: Path, *arguments: str, module: str | None = "launch", python: str = sys.executable
    ) -> None:
        self._value = secrets.token_hex(8)
        self._start = time.time()
        self._streams = [place / f".{self._value}.{name}" for name in ("out", "err")]
        require_installed()
        environment = {**os.environ, MARK: self._value}
        environment.pop("PYTHONPATH", None)  # the command must find the project because it is installed
        program = [str(INSTALLED)] if module is None else [python, "-m", module]
        with self._streams[0].open("w") as out, self._streams[1].open("w") as err:
            self.process = subprocess.Popen(
                [*program, *arguments],
                cwd=place,
                env=environment,
                stdout=out,
                stderr=err,
                preexec_fn=_restore_sigint,
            )

    @property
    def pid(self) -> int:
        return self.process.pid

    def process_tree(self) -> list[psutil.Process]:
        """The command and all its living descendants, without jobs that it submitted: SLURM starts those with the
        submitter's environment."""
        return processes_with({MARK: self._value, "SLURM_JOB_ID": os.environ.get("SLURM_JOB_ID")})

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def finish(self, deadline_s: float) -> Finished:
        """Wait until it ends. Errors: TimeoutError; AssertionError if it leaves processes or shared memory behind."""
        try:
            self.process.wait(deadline_s)
        except subprocess.TimeoutExpired:
            self.kill()
            raise TimeoutError(f"{self.process.args} did not end within {deadline_s} s:\n{self.output()}") from None
        leftovers = wait_for_end(self.process_tree, END_S)
        assert not leftovers, f"{self.process.args} left behind: {leftovers}\n{self.output()}"
        # Other programs on the machine may have short-lived files there too.
        wait_until(lambda: not _unused_shared_memory(self._start), END_S, "shared memory as clean as before")
        return Finished(self.process.returncode, *(path.read_text() for path in self._streams))

    def kill(self) -> None:
        """Kill the command and its descendants."""
        for process in self.process_tree():
            _kill_process(process)
        self.process.wait()

    def output(self) -> str:
        """Its stdout and stderr so far."""
        return "\n".join(path.read_text() for path in self._streams)


def launch(place: Path, *arguments: str, module: str | None = "launch", deadline_s: float = 180) -> Finished:
    """Run one command to its end. It takes seconds, but may have only a tenth of a core."""
    return Command(place, *arguments, module=module).finish(deadline_s)
