"""A wandb run written by its own thread, so that wandb can neither stop nor delay training.

Rows are numbered, and a row's number is its step in wandb. The mirror first determines which rows wandb has already,
from the server when online and from wandb's own files when offline, and sends the others: wandb has each row once,
however often the run is resumed and whatever a killed process lost. `wandb_ids` determines the wandb run. Console
output, code, git state, environment and host name are not captured.
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

from pipeline.run.tracking.wandb_ids import mark_synced, offline_id_of, run_id_of
from pipeline.run.tracking.wandb_mode import Mode, asked_mode

if TYPE_CHECKING:
    import wandb

WandbMode = Literal["auto", "online", "offline", "disabled"]
Level = Literal["INFO", "WARN", "ERROR"]

INIT_SECONDS = 20.0
"""Timeout of an online start, after which the run is recorded offline."""
UPLOAD_SECONDS = 20.0
"""Timeout of the final upload; the rest stays on disk."""
FINISH_SECONDS = 45.0
"""Timeout of `Mirror.finish`: a failing start plus a hanging upload, with a margin."""
LONGEST_TITLE, LONGEST_TEXT = 63, 1000
"""Maximum lengths of an alert's title and text, in characters."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Label:
    """Static description of a wandb run, whose files and ids are in `folder`/wandb."""

    folder: Path
    project: str
    group: str
    name: str
    job_type: str
    config: Mapping[str, Any]
    axes: Mapping[str, str]
    """Metrics, such as "train/*" -> the metric on their x-axis."""
    rows: str = ""
    """Describes how rows are numbered, see `wandb_ids`."""


class Mirror:
    """Writes one wandb run. No method raises; errors are logged as warnings."""

    def __init__(self, label: Label, mode: WandbMode) -> None:
        self._items: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
        self._ended = threading.Event()
        self._label = label
        self._used: list[str] = []
        # A daemon, so that waiting for items does not keep the process alive.
        self._thread = threading.Thread(
            target=_process_items, args=(self._items, label, mode, self._ended), name="wandb-mirror", daemon=True
        )
        self._thread.start()
        self._begin(None)

    def _begin(self, tag: str | None) -> None:
        # Not in the thread, which may lag behind: the id on disk must never belong to rows that were dropped.
        try:
            self._put("begin", (run_id_of(self._label.folder, self._label.rows), tag))
        except (OSError, ValueError) as error:
            self._put("fail", error)

    def row(self, number: int, values: Mapping[str, float]) -> None:
        """Log a row, numbered from 0; a row that wandb has already is skipped."""
        self._put("row", (number, dict(values)))

    def do(self, what: str, action: Callable[[wandb.Run], object]) -> None:
        """Any other action on a wandb run; if it fails, the warning names `what`."""
        self._put("do", (what, action))

    def summary(self, values: Mapping[str, Any]) -> None:
        """Values for the project's table of runs."""
        copy = dict(values)
        self.do("the summary", lambda run: run.summary.update(copy))

    def alert(self, title: str, text: str, level: Level) -> None:
        """Send an alert. wandb sends at most one per title and minute."""
        title, text = title[:LONGEST_TITLE], text[:LONGEST_TEXT]
        self.do(f"the alert {title!r}", lambda run: run.alert(title, text, level))

    def uses(self, artifact: str) -> None:
        """Record that this run starts from another run's artifact. Online only, since the server resolves it."""
        self._used.append(artifact)
        self._use(artifact)

    def _use(self, artifact: str) -> None:
        def use(run: wandb.Run) -> None:
            if not run.offline:
                run.use_artifact(f"{artifact}:latest")

        self.do(f"the lineage from {artifact}", use)

    def produces(
        self, artifact: str, kind: str, files: list[Path], metadata: Mapping[str, Any], description: str | None = None
    ) -> None:
        """Log immutable files as an artifact, described in Markdown. Online only: offline they are in the run directory
        anyway."""
        copy = dict(metadata)

        def log(run: wandb.Run) -> None:
            if run.offline:
                return
            import wandb

            logged = wandb.Artifact(artifact, kind, description, copy)
            for path in files:
                logged.add_file(str(path), policy="immutable")
            run.log_artifact(logged)

        self.do(f"the artifact {artifact}", log)

    def start_new_run(self, tag: str) -> None:
        """After `forget_run`: tag and end the current wandb run, whose rows are obsolete, and start another."""
        self._begin(tag)
        for artifact in self._used:
            self._use(artifact)

    def finish(self, *, failed: bool = False) -> bool:
        """Finish the wandb run, within a deadline. Returns whether wandb has all data, online or in its files."""
        self._put("finish", int(failed))
        self._thread.join(FINISH_SECONDS)
        if self._thread.is_alive():
            logger.warning("wandb did not finish within %.0f s; the run does not wait for it", FINISH_SECONDS)
        return self._ended.is_set()

    def _put(self, kind: str, value: Any) -> None:
        if self._thread.is_alive():
            self._items.put((kind, value))


def _process_items(
    items: queue.SimpleQueue[tuple[str, Any]], label: Label, mode: WandbMode, ended: threading.Event
) -> None:
    """Body of the mirror's thread."""
    try:
        resolved_mode = choose_mode() if mode == "auto" else mode
        if resolved_mode == "disabled":
            return
        run: Any = None  # set by the first item
        run_id, next_row = "", 0
        while True:
            kind, value = items.get()
            if kind == "begin":
                if run is not None:
                    _abandon(run, label, run_id, value[1])
                run_id = value[0]
                run, next_row = _start(label, resolved_mode, run_id)
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
    except Exception as error:  # no error of wandb may stop the run
        logger.warning("wandb stopped; the run continues: %s", _one_line(error))


def _try(run: wandb.Run, what: str, action: Callable[[wandb.Run], object]) -> bool:
    try:
        action(run)
    except Exception as error:
        logger.warning("wandb does not have %s: %s", what, _one_line(error))
        return False
    return True


def _start(label: Label, mode: Literal["online", "offline"], run_id: str) -> tuple[wandb.Run, int]:
    """The wandb run, and the number of the first row that it lacks."""
    import wandb

    from pipeline.run.tracking.wandb_history import count_recorded_rows

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
            # wandb's service cannot be reused after a failed start.
            wandb.teardown()
    if run is None:
        offline_id = offline_id_of(label.folder, run_id)
        run = wandb.init(mode="offline", id=offline_id, settings=_settings(), **arguments)
        next_row = count_recorded_rows(label.folder / "wandb", offline_id)
    else:
        next_row = run.starting_step
    for axis in sorted(set(label.axes.values())):
        run.define_metric(axis)
    for metric, axis in label.axes.items():
        run.define_metric(metric, step_metric=axis)
    return run, next_row


def _abandon(run: wandb.Run, label: Label, run_id: str, tag: str) -> None:
    def add_tag(abandoned: wandb.Run) -> None:
        abandoned.tags = (*(abandoned.tags or ()), tag)

    _try(run, f"the tag {tag!r}", add_tag)
    _try(run, "all of the abandoned run", lambda abandoned: _end(abandoned, label, run_id, 0))


def _end(run: wandb.Run, label: Label, run_id: str, exit_code: int) -> None:
    """Errors: TimeoutError if the upload takes too long."""
    run.finish(exit_code=exit_code)
    if not run.offline:
        mark_synced(label.folder, run_id)


def choose_mode() -> Mode:
    """Resolve "auto": what a person has asked wandb for, else online exactly if wandb finds credentials.

    Errors: those of `asked_mode`.
    """
    import wandb
    from wandb.sdk.lib import wbauth

    if (asked := asked_mode(os.environ, Path.cwd())) is not None:
        return asked
    host = wandb.setup().settings.base_url
    credentials = wbauth.authenticate_session(host=host, source="pipeline", prompt=False, update_session=False)
    return "online" if credentials else "offline"


def ask_server() -> str:
    """The address of wandb's server, once it has accepted the key. Errors: wandb's, of many types."""
    import wandb

    try:
        wandb.Api(timeout=int(INIT_SECONDS))  # asks it who owns the key
        return wandb.setup().settings.base_url
    finally:
        wandb.teardown()


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
        # A killed worker loses up to this much; the default is 15 s.
        x_transaction_log_flush_interval=1.0,
    )


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
