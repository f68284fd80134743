"""The log of a run's failures, and the test for one that repeats."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Collection
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from pipeline.run.files import open_to_append, read_rows
from pipeline.run.layout import RunFolder

log = logging.getLogger(__name__)

FAILURES = "failures.jsonl"
"""Log file with one line per failure of a worker."""


@dataclass(frozen=True)
class Failure:
    """One worker's exception, and where it was raised."""

    attempt: str
    rank: int
    stage: str | None
    step: int | None
    error: str

    def repeats(self, other: Failure) -> bool:
        return (self.stage, self.step, self.error) == (other.stage, other.step, other.error)


def append_to_log(run_folder: Path, name: str, text: str) -> None:
    """Append whole lines to a log of the run, in one write, so that lines of concurrent ranks do not interleave.

    If that fails, as on a full disk, the text is logged instead: a failing disk must not hide the original failure.
    """
    try:
        with open_to_append(RunFolder(run_folder).logs / name) as stream:
            stream.write(text)
    except OSError as error:
        log.error("%s: logs/%s cannot be written: %s: %s", run_folder.name, name, error, text.rstrip())


def record_failure(run_folder: Path, failure: Failure) -> None:
    """Append one line to the log of failures."""
    append_to_log(run_folder, FAILURES, json.dumps({"time": time.time(), **asdict(failure)}) + "\n")


def read_failures(run_folder: Path) -> list[Failure]:
    """All recorded failures of a run, oldest first; damaged lines are skipped."""
    names = [field.name for field in fields(Failure)]
    rows = read_rows(RunFolder(run_folder).logs / FAILURES)
    return [Failure(**{name: row[name] for name in names}) for row in rows if row.keys() >= set(names)]


def repeated_failure(run_folder: Path, attempt: str, killed: Collection[str] = ()) -> Failure | None:
    """The failure of this attempt that also ended the attempt before it, at the same step; None if there is none.

    Attempts in `killed`, whose workers were killed, are skipped: their recorded failures are only lost peers.
    """
    failures = [f for f in read_failures(run_folder) if f.attempt not in killed]
    current = [f for f in failures if f.attempt == attempt]
    earlier = [f for f in failures if f.attempt != attempt]
    previous = [f for f in earlier if f.attempt == earlier[-1].attempt]
    return next((one for one in current for other in previous if one.repeats(other)), None)
