"""What wandb really logged: its own files, read record by record."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import wandb

from pipeline.run.tracking.wandb_history import read_records


@dataclass
class Recorded:
    """One start of a wandb run."""

    folder: Path
    started_ns: int = 0
    run_id: str = ""
    project: str = ""
    group: str = ""
    name: str = ""
    job_type: str = ""
    host: str = ""
    tags: list[str] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    axes: dict[str, str] = field(default_factory=dict)
    alerts: list[tuple[str, str, str]] = field(default_factory=list)
    exit_code: int | None = None

    def table(self, name: str) -> dict[str, Any]:
        """A table that a row names: columns and data."""
        (place,) = [row[name]["path"] for row in self.rows if name in row]
        return json.loads((self.folder / "files" / place).read_text())


def warnings_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What the project logged that is worse than information."""
    ours = [record for record in caplog.records if record.name.startswith("pipeline")]
    return [record.getMessage() for record in ours if record.levelno >= logging.WARNING]


def recorded(folder: Path) -> list[Recorded]:
    """All starts that `folder`/wandb holds, the oldest first."""
    wandb.teardown()  # run.finish() may return a moment before the service has written the last rows
    paths = (folder / "wandb").glob("*run-*/run-*.wandb")
    return sorted(map(_recorded, paths), key=lambda start: start.started_ns)  # folders' names tell seconds only


def _recorded(path: Path) -> Recorded:
    found = Recorded(path.parent)
    for record in read_records(path):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            run = record.run
            found.started_ns = run.start_time.ToNanoseconds()
            found.run_id, found.project, found.group = run.run_id, run.project, run.run_group
            found.name, found.job_type, found.host = run.display_name, run.job_type, run.host
            found.tags = list(run.tags)
            _update(found.config, run.config.update)
        elif kind == "config":
            _update(found.config, record.config.update)
        elif kind == "history":
            row: dict[str, Any] = {"_step": record.history.step.num}
            _update(row, record.history.item)
            found.rows.append(row)
        elif kind == "summary":
            _update(found.summary, record.summary.update)
        elif kind == "metric":
            found.axes[record.metric.name or record.metric.glob_name] = record.metric.step_metric
        elif kind == "alert":
            found.alerts.append((record.alert.title, record.alert.text, record.alert.level))
        elif kind == "exit":
            found.exit_code = record.exit.exit_code
    return found


def _update(values: dict[str, Any], items: Any) -> None:
    for item in items:
        *parents, leaf = [item.key] if item.key else item.nested_key
        node = values
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = json.loads(item.value_json)
