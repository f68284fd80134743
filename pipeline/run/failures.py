"""The log of a run's failures, and whether one has happened before in the same place."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Collection
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from pipeline.run.files import read_rows
from pipeline.run.layout import RunFolder

log = logging.getLogger(__name__)

FAILURES = "failures.jsonl"
"""The log that holds every failure of a worker, one per line."""


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
        with (RunFolder(run_folder).logs / name).open("a") as stream:
            stream.write(text)
    except OSError as error:
        log.error("%s: logs/%s cannot be written: %s: %s", run_folder.name, name, error, text.rstrip())


def record_failure(run_folder: Path, failure: Failure) -> None:
    """Append one line to the log of failures, which the next attempt reads."""
    append_to_log(run_folder, FAILURES, json.dumps({"time": time.time(), **asdict(failure)}) + "\n")


def read_failures(run_folder: Path) -> list[Failure]:
    """All recorded failures of a run, oldest first; damaged lines are left out."""
    names = [field.name for field in fields(Failure)]
    rows = read_rows(RunFolder(run_folder).logs / FAILURES)
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
