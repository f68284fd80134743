"""How a run is asked to stop, how it is noticed that a worker hangs, and what is written down of a failure.

The train function runs outside the main thread, where no signal arrives: whoever wants the run to stop makes a file,
and the workers agree at the next step. Wall-clock time is used here only to notice silence; it decides nothing else.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import threading
import time
from collections.abc import Collection
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from pipeline.run.files import read_rows

log = logging.getLogger(__name__)

LOOK_S = 0.5
"""How often a worker looks whether the stop file is there; a look costs a call to a shared file system."""
FAILURES = "failures.jsonl"
"""The log that holds every failure of a worker, one per line."""
EXIT_HUNG = 70
"""Exit code of a worker that ended itself because it hung (EX_SOFTWARE)."""


class StopRequested(RuntimeError):
    """The run was asked to stop; everything up to here is in a checkpoint."""


class StopFile:
    """`requested()` is true once the file is there; without a file, never."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._looked_at = float("-inf")
        self._found = False

    def requested(self) -> bool:
        now = time.monotonic()
        if self._path is not None and not self._found and now - self._looked_at >= LOOK_S:
            self._looked_at = now
            self._found = self._path.exists()
        return self._found


class Watchdog:
    """Ends this process, stacks in its log, when `beat` has not been called for `deadline_s`: Ray then replaces it.

    A process that is frozen as a whole cannot do this; it is noticed by Ray, whose questions it leaves unanswered.
    """

    def __init__(self, deadline_s: float, stacks: Path) -> None:
        self._deadline_s = deadline_s
        self._stacks = stacks
        self._beat_at = time.monotonic()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def beat(self) -> None:
        self._beat_at = time.monotonic()

    def close(self) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(min(5.0, self._deadline_s / 4)):
            silent_s = time.monotonic() - self._beat_at
            if silent_s > self._deadline_s:
                with self._stacks.open("a") as stream:
                    print(f"no step for {silent_s:.0f} s (workers.hang_timeout_s); where every thread is:", file=stream)
                    faulthandler.dump_traceback(stream, all_threads=True)
                os._exit(EXIT_HUNG)


@dataclass(frozen=True)
class Failure:
    """What one worker's exception was, and where."""

    attempt: str
    rank: int
    stage: str | None
    step: int | None
    error: str

    def happened_like(self, other: Failure) -> bool:
        return (self.stage, self.step, self.error) == (other.stage, other.step, other.error)


def append_to_log(run_folder: Path, name: str, text: str) -> None:
    """Append whole lines to a log of the run; concurrent ranks do not mix, as it is one write.

    Where that fails, as on a full disk, it is said with the text: what happened must not be hidden by it.
    """
    try:
        with (run_folder / "logs" / name).open("a") as stream:
            stream.write(text)
    except OSError as error:
        log.error("%s: logs/%s cannot be written: %s: %s", run_folder.name, name, error, text.rstrip())


def record_failure(run_folder: Path, failure: Failure) -> None:
    """Append one line, for whoever starts again."""
    append_to_log(run_folder, FAILURES, json.dumps({"time": time.time(), **asdict(failure)}) + "\n")


def read_failures(run_folder: Path) -> list[Failure]:
    """All recorded failures of a run, oldest first; damaged lines are left out."""
    names = [field.name for field in fields(Failure)]
    rows = read_rows(run_folder / "logs" / FAILURES)
    return [Failure(**{name: row[name] for name in names}) for row in rows if row.keys() >= set(names)]


def repeated_failure(run_folder: Path, attempt: str, killed: Collection[str] = ()) -> Failure | None:
    """The failure of this attempt that the one before it ended with as well, at the same step; None if none.

    Attempts whose workers were killed are passed over: what is recorded of them is that somebody is gone.
    """
    failures = [f for f in read_failures(run_folder) if f.attempt not in killed]
    ours = [f for f in failures if f.attempt == attempt]
    others = [f for f in failures if f.attempt != attempt]
    before = [f for f in others if f.attempt == others[-1].attempt]
    return next((one for one in ours for other in before if one.happened_like(other)), None)
