"""Metrics of one stage: `metrics.jsonl` first, wandb as a mirror that can never stop a run.

Only rank 0 tracks. The stage's wandb run has group = run name, job type = phase, and an id that is stored beside its
data, so that a resumed stage continues the same wandb run; row number n of the file is its step n.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from pipeline.run.files import atomic_write_text, naming, parse_row, read_rows
from pipeline.run.layout import StageFolder
from pipeline.run.tracking.wandb_ids import forget_run
from pipeline.run.tracking.wandb_mirror import Label, Level, Mirror, WandbMode

AXES = {"train/*": "images_seen", "validation/*": "epoch", "system/*": "images_seen"}
"""What wandb draws by what; the optimizer step is in every row too, as global_step."""


def cut_rows(path: Path, step: int) -> int:
    """Drop the rows that a resumed stage will write again: those beyond `step`, the checkpoint's, and damaged lines.

    The rest stays byte for byte, and the file is replaced atomically. A missing file is an empty one. Returns how many
    lines were dropped.
    """
    if not path.exists():
        return 0
    # Without the newline a line is torn, even if what is there happens to parse.
    lines = path.read_bytes().splitlines(keepends=True)
    kept = []
    for line in lines:
        row = parse_row(line)
        if row is not None and isinstance(row.get("step"), int) and row["step"] <= step:
            kept.append(line.decode())
    if len(kept) < len(lines):
        atomic_write_text(path, "".join(kept))
    return len(lines) - len(kept)


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """{"timing": {"seconds": 2}} -> {"timing/seconds": 2.0}; what is not a number, null included, is left out."""
    flat: dict[str, float] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}/")
        elif isinstance(value, (bool, int, float)):
            flat[f"{prefix}{key}"] = float(value)
    return flat


class Tracker:
    """Writes a stage's metrics. A context manager: however the stage ends, the file is on disk and wandb is ended."""

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

        What is in the file already is true: wandb is given what it lacks of it. After a change of `log_every_steps` or
        `project` that is all of it, in another wandb run.
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
                    self._to_wandb(row)
        self._stream = self._path.open("a", encoding="utf-8")

    def _to_wandb(self, row: Mapping[str, Any]) -> None:
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
        """Append one row, which holds "kind" and "step". Errors: ValueError for NaN or infinity, which JSON has not."""
        with naming(self._path):
            self._stream.write(json.dumps(row, allow_nan=False) + "\n")
            self._stream.flush()
        self._to_wandb(row)

    def cut(self, step: int) -> None:
        """Drop the rows beyond `step`, as the stage goes back to it and on in another way.

        wandb cannot drop rows: it begins another run with those that stay, and the one that has them all is tagged.
        """
        self._stream.close()
        forget_run(self._path.parent)
        cut_rows(self._path, step)
        if self._mirror is not None:
            self._mirror.begin_anew("went back")
        self._open()

    def summary(self, values: Mapping[str, Any]) -> None:
        """Final numbers of the stage, and texts, for wandb's table of runs; their file is the stage's result."""
        if self._mirror is not None:
            texts = {key: value for key, value in values.items() if isinstance(value, str)}
            self._mirror.summary(flatten(values) | texts)

    def alert(self, title: str, text: str, level: Level) -> None:
        """Tell whoever has wandb's alerts on."""
        if self._mirror is not None:
            self._mirror.alert(title, text, level)

    def uses(self, artifact: str) -> None:
        """The stage begins with another stage's artifact."""
        if self._mirror is not None:
            self._mirror.uses(artifact)

    def produces(self, artifact: str, files: list[Path], metadata: Mapping[str, Any]) -> None:
        """The stage's network as an artifact."""
        if self._mirror is not None:
            self._mirror.produces(artifact, "model", files, metadata)

    def sync(self) -> None:
        """Bring the rows to disk; before a checkpoint is committed, so that no row up to its step can be lost."""
        with naming(self._path):
            self._stream.flush()
            os.fsync(self._stream.fileno())

    def finish(self, *, failed: bool = False) -> None:
        """Close the file and end the wandb run, within a deadline. Calling it again does nothing."""
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
"""What time is spent in. `update` is all the rest: forward, backward, optimizer, masks, waiting for other workers."""
