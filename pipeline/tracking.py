"""Metrics of one stage: `metrics.jsonl` first, wandb as a mirror that can never stop a run.

Only rank 0 tracks. wandb is imported here and nowhere else, and runs in a thread of its own: a slow, missing or broken
server costs training nothing. The stage's wandb run has group = run name, job type = phase, and an id that is stored
beside its data, so that a resumed stage continues the same wandb run. No console, code, git or environment is captured.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import threading
import uuid
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

from pipeline.files import atomic_write_text, parse_row

if TYPE_CHECKING:
    import wandb

WandbMode = Literal["auto", "online", "offline", "disabled"]

INIT_SECONDS = 20.0
"""How long an online start is tried before the stage is recorded offline."""
UPLOAD_SECONDS = 20.0
"""How long wandb may go on uploading once a stage is done; what is left stays on disk."""
FINISH_SECONDS = 45.0
"""The most that `Tracker.finish` waits for the mirror: a start that fails and an upload that hangs, with a margin."""

logger = logging.getLogger(__name__)


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
        recipe_dict: Mapping[str, Any],
        wandb_mode: WandbMode,
        project: str,
    ) -> None:
        """`stage` is the stage's path in the run, such as "keep-0.1/prune"; its last part is wandb's job type."""
        self._path = stage_folder / "metrics.jsonl"
        self._stream = self._path.open("a", encoding="utf-8")
        self._mirror: threading.Thread | None = None
        self._items: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
        if wandb_mode != "disabled":
            arguments = {
                "dir": str(stage_folder),
                "project": project,
                "group": run_name,
                "name": stage,
                "job_type": stage.rsplit("/", 1)[-1],
                "config": dict(recipe_dict),
                "resume": "allow",
                "reinit": "create_new",
            }
            self._mirror = threading.Thread(
                target=_mirror,
                args=(self._items, stage_folder, arguments, wandb_mode),
                name="wandb-mirror",
                daemon=True,
            )
            self._mirror.start()

    def log(self, row: Mapping[str, Any]) -> None:
        """Append one row, which holds "kind" and "step". Errors: ValueError for NaN or infinity, which JSON has not."""
        self._stream.write(json.dumps(row, allow_nan=False) + "\n")
        self._stream.flush()
        values = {key: value for key, value in row.items() if key not in ("kind", "step")}
        self._send("row", {"global_step": int(row["step"]), **flatten(values, f"{row['kind']}/")})

    def cut(self, step: int) -> None:
        """Drop the rows beyond `step`, as the stage goes back to it. wandb keeps what it has, as after a resume."""
        self._stream.close()
        cut_rows(self._path, step)
        self._stream = self._path.open("a", encoding="utf-8")

    def summary(self, values: Mapping[str, Any]) -> None:
        """Final numbers of the stage for wandb's table of runs; their file is the stage's result."""
        self._send("summary", flatten(values))

    def sync(self) -> None:
        """Bring the rows to disk; before a checkpoint is committed, so that no row up to its step can be lost."""
        self._stream.flush()
        os.fsync(self._stream.fileno())

    def finish(self, *, failed: bool = False) -> None:
        """Close the file and end the wandb run, within a deadline. Calling it again does nothing."""
        if self._stream.closed:
            return
        self.sync()
        self._stream.close()
        self._send("finish", int(failed))
        if self._mirror is not None:
            self._mirror.join(FINISH_SECONDS)
            if self._mirror.is_alive():
                logger.warning("wandb did not finish within %.0f s; metrics.jsonl is complete", FINISH_SECONDS)

    def _send(self, kind: str, value: Any) -> None:
        if self._mirror is not None and self._mirror.is_alive():
            self._items.put((kind, value))

    def __enter__(self) -> Tracker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.finish(failed=kind is not None)


def _mirror(
    items: queue.SimpleQueue[tuple[str, Any]], stage_folder: Path, arguments: dict[str, Any], mode: WandbMode
) -> None:
    """The mirror's thread. It waits for items as long as the stage lives; being a daemon it holds nobody up."""
    try:
        run = _start(stage_folder, arguments, mode)
        while True:
            kind, value = items.get()
            if kind == "row":
                run.log(value)
            elif kind == "summary":
                run.summary.update(value)
            else:
                run.finish(exit_code=value)
                return
    except Exception as error:  # whatever wandb does wrong, a mirror may not stop the run
        logger.warning("wandb stopped, metrics.jsonl goes on: %s", _one_line(error))


def _start(stage_folder: Path, arguments: dict[str, Any], mode: WandbMode) -> wandb.Run:
    import wandb

    arguments = {**arguments, "id": _stored_id(stage_folder / "wandb" / "run_id")}
    chosen = _choose_mode() if mode == "auto" else mode
    try:
        run = wandb.init(mode=chosen, settings=_settings(), **arguments)
    except Exception as error:
        if chosen != "online":
            raise
        logger.warning(
            "wandb is not reachable, so %s is recorded offline (`wandb sync` uploads it): %s",
            arguments["name"],
            _one_line(error),
        )
        # wandb's service keeps the id of a failed start as taken; a new service does not know it.
        wandb.teardown()
        run = wandb.init(mode="offline", settings=_settings(), **arguments)
    run.define_metric("global_step")
    run.define_metric("*", step_metric="global_step")
    return run


def _choose_mode() -> Literal["online", "offline", "disabled"]:
    """What "auto" means: WANDB_MODE if the user has set it, else online exactly where wandb finds credentials."""
    import wandb
    from wandb.sdk.lib import wbauth

    match os.environ.get("WANDB_MODE"):
        case "online" | "offline" | "disabled" as wanted:
            return wanted
    host = wandb.setup().settings.base_url
    found = wbauth.authenticate_session(host=host, source="pipeline", prompt=False, update_session=False)
    return "online" if found else "offline"


def _settings() -> wandb.Settings:
    import wandb

    return wandb.Settings(
        console="off",
        silent=True,
        disable_git=True,
        disable_code=True,
        save_code=False,
        x_save_requirements=False,
        x_disable_meta=True,
        x_disable_machine_info=True,
        x_disable_stats=True,
        login_timeout=INIT_SECONDS,
        init_timeout=INIT_SECONDS,
        finish_timeout=UPLOAD_SECONDS,
        # The default of 15 s is what a killed worker would lose.
        x_transaction_log_flush_interval=1.0,
    )


def _stored_id(path: Path) -> str:
    """The stage's wandb id, made once and kept, so that a resumed stage is the same wandb run."""
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        atomic_write_text(path, uuid.uuid4().hex[:16] + "\n")
    return path.read_text(encoding="utf-8").strip()


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
