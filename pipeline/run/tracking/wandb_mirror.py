"""A wandb run that is written from a thread of its own: it can neither stop nor delay who writes it.

Rows are numbered, and a row's number is its step in wandb. At its start wandb is asked which rows it has: the server
where it is online, wandb's own files where it is not. It takes the others, so that it has each row once however often
the run is resumed and whatever was lost with a process that was killed; `wandb_ids` says which run that is. No console,
code, git, environment or name of a host is captured.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pipeline.run.tracking.wandb_ids import kept_run, offline_run, settle_offline

if TYPE_CHECKING:
    import wandb

WandbMode = Literal["auto", "online", "offline", "disabled"]
Level = Literal["INFO", "WARN", "ERROR"]

INIT_SECONDS = 20.0
"""How long an online start is tried before the run is recorded offline."""
UPLOAD_SECONDS = 20.0
"""How long wandb may go on uploading at the end; what is left stays on disk."""
FINISH_SECONDS = 45.0
"""The most that `Mirror.finish` waits: a start that fails and an upload that hangs, with a margin."""
LONGEST_TITLE, LONGEST_TEXT = 63, 1000
"""Characters of an alert."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Label:
    """What wandb is told of a run once. Its files and its ids lie in `folder`/wandb."""

    folder: Path
    project: str
    group: str
    name: str
    job_type: str
    config: Mapping[str, Any]
    axes: Mapping[str, str]
    """Metrics, such as "train/*" -> the metric that is their x-axis."""
    rows: str = ""
    """What decides which row has which number, see `wandb_ids`."""


class Mirror:
    """Writes one wandb run. Nothing here raises; what goes wrong is logged as a warning."""

    def __init__(self, label: Label, mode: WandbMode) -> None:
        self._items: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
        self._ended = threading.Event()
        self._label = label
        self._used: list[str] = []
        # A daemon: it waits for items as long as the process lives, and holds nobody up.
        self._thread = threading.Thread(
            target=_work, args=(self._items, label, mode, self._ended), name="wandb-mirror", daemon=True
        )
        self._thread.start()
        self._begin(None)

    def _begin(self, tag: str | None) -> None:
        # Here, not in the thread: the id on disk is never one of rows that are no longer true, however late it is.
        try:
            self._put("begin", (kept_run(self._label.folder, self._label.rows), tag))
        except OSError as error:
            self._put("fail", error)

    def row(self, number: int, values: Mapping[str, float]) -> None:
        """A row, numbered from 0; one that wandb has is left out."""
        self._put("row", (number, dict(values)))

    def do(self, what: str, action: Callable[[wandb.Run], object]) -> None:
        """Anything else that is done with a wandb run; if that fails, `what` is in the warning."""
        self._put("do", (what, action))

    def summary(self, values: Mapping[str, Any]) -> None:
        """What the project's table of runs shows."""
        kept = dict(values)
        self.do("the summary", lambda run: run.summary.update(kept))

    def alert(self, title: str, text: str, level: Level) -> None:
        """A message to whoever has wandb's alerts on. One of a title per minute at most, as wandb has it."""
        title, text = title[:LONGEST_TITLE], text[:LONGEST_TEXT]
        self.do(f"the alert {title!r}", lambda run: run.alert(title, text, level))

    def uses(self, artifact: str) -> None:
        """This run begins with another's artifact: lineage. Online only, as it is the server that knows them."""
        self._used.append(artifact)
        self._use(artifact)

    def _use(self, artifact: str) -> None:
        def use(run: wandb.Run) -> None:
            if not run.offline:
                run.use_artifact(f"{artifact}:latest")

        self.do(f"the lineage from {artifact}", use)

    def produces(self, artifact: str, kind: str, files: list[Path], metadata: Mapping[str, Any]) -> None:
        """Files that stay as they are, as an artifact. Online only: offline they lie in the run directory anyway."""
        kept = dict(metadata)

        def log(run: wandb.Run) -> None:
            if run.offline:
                return
            import wandb

            made = wandb.Artifact(artifact, kind, metadata=kept)
            for path in files:
                made.add_file(str(path), policy="immutable")
            run.log_artifact(made)

        self.do(f"the artifact {artifact}", log)

    def begin_anew(self, tag: str) -> None:
        """After `forget_run`: the run that has rows which are no longer true is left, tagged, for another one."""
        self._begin(tag)
        for artifact in self._used:
            self._use(artifact)

    def finish(self, *, failed: bool = False) -> bool:
        """End the wandb run, within a deadline. Returns whether wandb has all of it, on the server or in its files."""
        self._put("finish", int(failed))
        self._thread.join(FINISH_SECONDS)
        if self._thread.is_alive():
            logger.warning("wandb did not finish within %.0f s; nothing but wandb waits for it", FINISH_SECONDS)
        return self._ended.is_set()

    def _put(self, kind: str, value: Any) -> None:
        if self._thread.is_alive():
            self._items.put((kind, value))


def _work(items: queue.SimpleQueue[tuple[str, Any]], label: Label, mode: WandbMode, ended: threading.Event) -> None:
    """The thread."""
    try:
        chosen = _choose_mode() if mode == "auto" else mode
        if chosen == "disabled":
            return
        run: Any = None  # the first item begins one
        run_id, next_row = "", 0
        while True:
            kind, value = items.get()
            if kind == "begin":
                if run is not None:
                    _leave(run, label, run_id, value[1])
                run_id = value[0]
                run, next_row = _start(label, chosen, run_id)
            elif kind == "fail":
                raise value
            elif kind == "row":
                number, values = value
                if number >= next_row:
                    run.log(values, step=number, commit=True)
                    next_row = number + 1
            elif kind == "do":
                _try(run, *value)
            else:
                if _try(run, f"all of {label.name}", lambda run, code=value, of=run_id: _end(run, label, of, code)):
                    ended.set()
                return
    except Exception as error:  # whatever wandb does wrong, a mirror may not stop the run
        logger.warning("wandb stopped, the run goes on: %s", _one_line(error))


def _try(run: wandb.Run, what: str, action: Callable[[wandb.Run], object]) -> bool:
    try:
        action(run)
    except Exception as error:
        logger.warning("wandb does not have %s: %s", what, _one_line(error))
        return False
    return True


def _start(label: Label, mode: Literal["online", "offline"], run_id: str) -> tuple[wandb.Run, int]:
    """The wandb run, and the number of the first row that it has not."""
    import wandb

    from pipeline.run.tracking.wandb_history import recorded_rows

    arguments: dict[str, Any] = {
        "dir": str(label.folder),
        "project": label.project,
        "group": label.group,
        "name": label.name,
        "job_type": label.job_type,
        "config": dict(label.config),
        "reinit": "create_new",
        "resume": "allow",
    }
    run = None
    if mode == "online":
        try:
            run = wandb.init(mode="online", id=run_id, settings=_settings(), **arguments)
        except Exception as error:
            logger.warning(
                "wandb is not reachable, so %s is recorded offline (`wandb sync` uploads it): %s",
                label.name,
                _one_line(error),
            )
            # A service that has a failed start in it is not used again.
            wandb.teardown()
    if run is None:
        offline_id = offline_run(label.folder, run_id)
        run = wandb.init(mode="offline", id=offline_id, settings=_settings(), **arguments)
        next_row = recorded_rows(label.folder / "wandb", offline_id)
    else:
        next_row = run.starting_step
    for axis in sorted(set(label.axes.values())):
        run.define_metric(axis)
    for metric, axis in label.axes.items():
        run.define_metric(metric, step_metric=axis)
    return run, next_row


def _leave(run: wandb.Run, label: Label, run_id: str, tag: str) -> None:
    def mark(left: wandb.Run) -> None:
        left.tags = (*(left.tags or ()), tag)

    _try(run, f"the tag {tag!r}", mark)
    _try(run, "all of the run that is left", lambda left: _end(left, label, run_id, 0))


def _end(run: wandb.Run, label: Label, run_id: str, exit_code: int) -> None:
    """Errors: TimeoutError if that is not all in time."""
    run.finish(exit_code=exit_code)
    if not run.offline:
        settle_offline(label.folder, run_id)


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
        host="",
        x_disable_meta=True,
        x_disable_machine_info=True,
        x_disable_stats=True,
        login_timeout=INIT_SECONDS,
        init_timeout=INIT_SECONDS,
        finish_timeout=UPLOAD_SECONDS,
        finish_timeout_raises=True,
        # The default of 15 s is what a killed worker would lose.
        x_transaction_log_flush_interval=1.0,
    )


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
