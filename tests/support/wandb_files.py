"""Reads what wandb has logged from its own files, record by record."""

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
    """The content of one start of a wandb run."""

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
        """A logged table: columns and data."""
        (path,) = [row[name]["path"] for row in self.rows if name in row]
        return json.loads((self.folder / "files" / path).read_text())


def warnings_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The project's log messages of level warning or higher."""
    ours = [record for record in caplog.records if record.name.startswith("pipeline")]
    return [record.getMessage() for record in ours if record.levelno >= logging.WARNING]


def recorded(folder: Path) -> list[Recorded]:
    """All starts in `folder`/wandb, oldest first."""
    wandb.teardown()  # run.finish() may return a moment before the service has written the last rows
    paths = (folder / "wandb").glob("*run-*/run-*.wandb")
    return sorted(map(_read_start, paths), key=lambda start: start.started_ns)  # folder names resolve only seconds


def _read_start(path: Path) -> Recorded:
    start = Recorded(path.parent)
    for record in read_records(path):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            run = record.run
            start.started_ns = run.start_time.ToNanoseconds()
            start.run_id, start.project, start.group = run.run_id, run.project, run.run_group
            start.name, start.job_type, start.host = run.display_name, run.job_type, run.host
            start.tags = list(run.tags)
            _update_nested(start.config, run.config.update)
        elif kind == "config":
            _update_nested(start.config, record.config.update)
        elif kind == "history":
            row: dict[str, Any] = {"_step": record.history.step.num}
            _update_nested(row, record.history.item)
            start.rows.append(row)
        elif kind == "summary":
            _update_nested(start.summary, record.summary.update)
        elif kind == "metric":
            start.axes[record.metric.name or record.metric.glob_name] = record.metric.step_metric
        elif kind == "alert":
            start.alerts.append((record.alert.title, record.alert.text, record.alert.level))
        elif kind == "exit":
            start.exit_code = record.exit.exit_code
    return start


def _update_nested(values: dict[str, Any], items: Any) -> None:
    for item in items:
        *parents, leaf = [item.key] if item.key else item.nested_key
        node = values
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = json.loads(item.value_json)
