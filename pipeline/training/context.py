"""The state that the stages of a run share in one worker: recipe, process group, loaders, observer, stop request."""

from __future__ import annotations

import platform
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pipeline.data.loading import sampling
from pipeline.data.manifest import DataError
from pipeline.distributed import Group
from pipeline.recipe.schema import Recipe
from pipeline.recipe.stages import Stage
from pipeline.run.stop import StopRequested

if TYPE_CHECKING:
    from pipeline.data.loading.loader import Loader

STAGING_POLL_S = 1.0
"""Interval at which the workers exchange the progress of their nodes' copies."""

Observer = Callable[[str, dict[str, Any]], None]
"""Observes a run from inside: called with an event's name and facts, on every rank."""


@dataclass
class RunContext:
    """Recipe, run directory, process group, and one Loader per file and process."""

    recipe: Recipe
    run_folder: Path
    token: str
    group: Group
    observer: Observer | None = None
    stop: Callable[[], bool] | None = None
    """Whether a stop was requested, as far as this worker knows; None: never."""
    staging_poll_s: float = STAGING_POLL_S
    _loaders: dict[str, Loader] = field(default_factory=dict)
    _resources: ExitStack = field(default_factory=ExitStack)

    def observe(self, event: str, facts: dict[str, Any]) -> None:
        """Report an event to the observer; `facts` have the stage, and the step if there is one."""
        if self.observer is not None:
            self.observer(event, facts)

    def stop_requested(self) -> bool:
        return self.stop is not None and self.stop()

    @property
    def local_micro_batches(self) -> int:
        """This worker's share of the micro-batches of a step."""
        return self.recipe.batch.micro_batches_per_step // self.group.world

    def loader(self, path: str) -> Loader:
        """The process's Loader of a file, kept for all stages; with data.stage_to, of the node's own copy. Collective.

        Its `path` is that of the original. Errors: DataError, ValueError; NodeCopyFailed; StopRequested while copying.
        """
        from pipeline.data.loading.loader import Loader  # imports FFCV, which an engine without images does not need
        from pipeline.data.loading.node_copy import NodeCopyLoader

        if path not in self._loaders:
            data, threads = self.recipe.data, self.recipe.workers.threads
            if data.stage_to is None:
                loader = Loader(path, image_size=data.image_size, threads=threads)
            else:
                copy = self._copy_to_node(Path(path), Path(data.stage_to))
                loader = NodeCopyLoader(Path(path), copy, image_size=data.image_size, threads=threads)
            self._loaders[path] = self._resources.enter_context(loader)
        return self._loaders[path]

    def _copy_to_node(self, path: Path, folder: Path) -> Path:
        """Path of this node's copy of a data file, once every node has its own. Collective.

        Nodes may be minutes apart, longer than a collective or the watchdog waits. So a thread copies, and the workers
        exchange their progress; while any copy advances, no worker counts as hung. All fail together.
        """
        from pipeline.data.loading.node_copy import NodeCopyFailed, copy_to_node

        cancelled = threading.Event()
        last_status = ""

        def report(status: str) -> None:
            nonlocal last_status
            last_status = status
            if cancelled.is_set():
                raise NodeCopyFailed(f"copying {path} was cancelled")

        with ThreadPoolExecutor(1, thread_name_prefix="staging") as pool:
            copying = pool.submit(copy_to_node, path, folder, report)
            previous = None
            try:
                while True:
                    done = not wait([copying], timeout=self.staging_poll_s).not_done
                    error = copying.exception() if done else None
                    problem = (isinstance(error, ValueError), f"{platform.node()}: {error}") if error else None
                    states = self.group.gather((done, last_status, problem, self.stop_requested()))
                    if states != previous:
                        self.observe("staging", {"stage": None})
                        previous = states
                    problems = [state[2] for state in states if state[2] is not None]
                    if problems:
                        kind = DataError if any(is_user_error for is_user_error, _ in problems) else NodeCopyFailed
                        raise kind("; ".join(sorted({message for _, message in problems}))) from error
                    if any(state[3] for state in states):
                        raise StopRequested(f"stopped on request while copying {path}; no step was lost")
                    if all(state[0] for state in states):
                        return copying.result()
            finally:
                cancelled.set()

    def training_samples(self, loader: Loader) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(ids of training samples, ids of held-out samples) of the training file."""
        data = self.recipe.data
        train_ids, held_out_ids = sampling.held_out(loader.num_samples, data.validation_images)
        return sampling.train_subset(train_ids, data.train_images), held_out_ids

    def folder(self, stage: Stage) -> Path:
        return self.run_folder / stage.name

    def close(self) -> None:
        self._resources.close()
