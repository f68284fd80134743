"""Metrics of one stage: written to `metrics.jsonl`, then mirrored to wandb, whose errors never stop a run.

Rank 0 only. The stage's wandb run has group = run name and job type = phase. Its id is stored in the stage folder, so
that a resumed stage continues the same wandb run. Row n of the file is wandb's step n.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from pipeline.run.files import atomic_write_text, naming, open_to_append, parse_row, read_rows, read_whole
from pipeline.run.layout import StageFolder
from pipeline.run.tracking.wandb_ids import forget_run
from pipeline.run.tracking.wandb_mirror import Label, Level, Mirror, WandbMode

AXES = {"train/*": "images_seen", "validation/*": "epoch", "system/*": "images_seen"}
"""Metrics -> x-axis of their wandb charts. Every row also has the optimizer step, as global_step."""


def truncate_rows(path: Path, step: int) -> int:
    """Drop the rows after `step`, the checkpoint's, which a resumed stage writes again, and damaged lines.

    The other rows are unchanged byte for byte, and the file is replaced atomically. A missing file has no rows. Returns
    the number of lines dropped.
    """
    if not path.exists():
        return 0
    # A line without its newline is torn, even if it parses.
    lines = read_whole(path).splitlines(keepends=True)
    kept = []
    for line in lines:
        row = parse_row(line)
        if row is not None and isinstance(row.get("step"), int) and row["step"] <= step:
            kept.append(line.decode())
    if len(kept) < len(lines):
        atomic_write_text(path, "".join(kept))
    return len(lines) - len(kept)


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """{"timing": {"seconds": 2}} -> {"timing/seconds": 2.0}; other values, including null, are left out."""
    flat: dict[str, float] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}/")
        elif isinstance(value, (bool, int, float)):
            flat[f"{prefix}{key}"] = float(value)
    return flat


class Tracker:
    """Writes a stage's metrics. A context manager, which flushes the file and finishes the wandb run on every exit."""

    def __init__(
        self,
        stage_folder: Path,
        *,
        run_name: str,
        stage: str,
        config: Mapping[str, Any],
        batch_per_step: int,
        log_every_steps: int,
        wandb_mode: WandbMode,
        project: str,
    ) -> None:
        """`stage` is the stage's path in the run, such as "keep-0.1/prune"; its last part is wandb's job type.

        Rows that the file has already are sent to wandb if they are missing there. After a change of `log_every_steps`
        or `project`, all rows are sent, to a new wandb run.
        """
        self._path = StageFolder(stage_folder).metrics
        self._batch_per_step = batch_per_step
        self._mirror: Mirror | None = None
        rows = f"every {log_every_steps} steps, {project}"
        forget_run(stage_folder, rows)
        if wandb_mode != "disabled":
            job_type = stage.rsplit("/", 1)[-1]
            label = Label(stage_folder, project, run_name, stage, job_type, config, AXES, rows)
            self._mirror = Mirror(label, wandb_mode)
        self._open()

    def _open(self) -> None:
        self._rows = 0
        if self._mirror is not None:
            for row in read_rows(self._path):
                if "kind" in row and isinstance(row.get("step"), int):
                    self._send_to_wandb(row)
        self._stream = open_to_append(self._path)

    def _send_to_wandb(self, row: Mapping[str, Any]) -> None:
        if self._mirror is None:
            return
        number, self._rows = self._rows, self._rows + 1
        step = int(row["step"])
        position = {"global_step": step, "images_seen": step * self._batch_per_step}
        if "epoch" in row:
            position["epoch"] = row["epoch"]
        values = {key: value for key, value in row.items() if key not in ("kind", "step", "epoch")}
        timing = dict(row.get("timing") or {})
        system = timing.pop("system", {})
        flat = flatten({**values, "timing": timing}, f"{row['kind']}/") | flatten(system, "system/")
        self._mirror.row(number, position | flat)

    def log(self, row: Mapping[str, Any]) -> None:
        """Append one row, which has "kind" and "step". Errors: ValueError for NaN or infinity, which JSON lacks."""
        with naming(self._path):
            self._stream.write(json.dumps(row, allow_nan=False) + "\n")
            self._stream.flush()
        self._send_to_wandb(row)

    def truncate(self, step: int) -> None:
        """Drop the rows after `step`, to which the stage rolls back.

        wandb cannot drop rows: the current wandb run is tagged and ended, and a new one starts with the remaining rows.
        """
        self._stream.close()
        forget_run(self._path.parent)
        truncate_rows(self._path, step)
        if self._mirror is not None:
            self._mirror.start_new_run("went back")
        self._open()

    def summary(self, values: Mapping[str, Any]) -> None:
        """Final numbers and texts of the stage for wandb's table of runs; on disk they are in the stage's result."""
        if self._mirror is not None:
            texts = {key: value for key, value in values.items() if isinstance(value, str)}
            self._mirror.summary(flatten(values) | texts)

    def alert(self, title: str, text: str, level: Level) -> None:
        """Send a wandb alert."""
        if self._mirror is not None:
            self._mirror.alert(title, text, level)

    def uses(self, artifact: str) -> None:
        """Record that the stage starts from another stage's artifact."""
        if self._mirror is not None:
            self._mirror.uses(artifact)

    def produces(self, artifact: str, files: list[Path], metadata: Mapping[str, Any]) -> None:
        """Log the stage's network as an artifact."""
        if self._mirror is not None:
            self._mirror.produces(artifact, "model", files, metadata)

    def sync(self) -> None:
        """Flush the rows to disk; called before a checkpoint is committed, so that none up to its step can be lost."""
        with naming(self._path):
            self._stream.flush()
            os.fsync(self._stream.fileno())

    def finish(self, *, failed: bool = False) -> None:
        """Close the file and finish the wandb run, within a deadline. Idempotent."""
        if self._stream.closed:
            return
        self.sync()
        self._stream.close()
        if self._mirror is not None:
            self._mirror.finish(failed=failed)

    def __enter__(self) -> Tracker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.finish(failed=kind is not None)


PARTS: tuple[str, ...] = ("data", "attack", "update", "checkpoint")
"""Parts of a step's time. `update` is the rest: forward, backward, optimizer, masks, waiting for other workers."""
