"""What the workers of one job share while they walk through its stages."""

from __future__ import annotations

import platform
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.data.loading import sampling
from pipeline.data.loading.loader import Loader
from pipeline.data.loading.node_copy import NodeCopyFailed, NodeCopyLoader, copy_to_node
from pipeline.data.manifest import DataError
from pipeline.distributed import Group
from pipeline.recipe.schema import Recipe
from pipeline.recipe.stages import Stage
from pipeline.run.stop import StopRequested
from pipeline.training.loop import Observer, unobserved

LOOK_S = 1.0
"""How often the workers tell each other how far their nodes' copies are."""


def never() -> bool:
    """Nobody asks this run to stop."""
    return False


@dataclass
class Job:
    """Recipe, run directory, process group, and one Loader per file and process."""

    recipe: Recipe
    run_folder: Path
    token: str
    group: Group
    observe: Observer = unobserved
    stop_requested: Callable[[], bool] = never
    """Whether this worker knows that the run is to stop."""
    _loaders: dict[str, Loader] = field(default_factory=dict)
    _resources: ExitStack = field(default_factory=ExitStack)

    def loader(self, path: str) -> Loader:
        """One Loader per file and process, kept for all stages; of the node's own copy with data.stage_to. Collective.

        Its `path` is the original's. Errors: DataError, ValueError; StagingFailed; StopRequested while copying.
        """
        if path not in self._loaders:
            data, threads = self.recipe.data, self.recipe.workers.threads
            if data.stage_to is None:
                loader = Loader(path, image_size=data.image_size, threads=threads)
            else:
                copy = self._staged(Path(path), Path(data.stage_to))
                loader = NodeCopyLoader(Path(path), copy, image_size=data.image_size, threads=threads)
            self._loaders[path] = self._resources.enter_context(loader)
            if len(loader.class_names) != self.recipe.model.num_classes:
                raise ValueError(
                    f"model.num_classes {self.recipe.model.num_classes}: {path} has {len(loader.class_names)} classes; "
                    f"set model.num_classes={len(loader.class_names)}"
                )
        return self._loaders[path]

    def _staged(self, path: Path, folder: Path) -> Path:
        """This node's copy of a data file, once every node has its own.

        Nodes may be minutes apart, more than a collective or the watchdog waits. So a thread copies, and the workers
        tell each other how far they are; as long as any of them gets on, none is taken for hung. They fail together.
        """
        given_up = threading.Event()
        heard = ""

        def listen(doing: str) -> None:
            nonlocal heard
            heard = doing
            if given_up.is_set():
                raise NodeCopyFailed(f"copying {path} was given up")

        with ThreadPoolExecutor(1, thread_name_prefix="staging") as pool:
            copying = pool.submit(copy_to_node, path, folder, listen)
            before = None
            try:
                while True:
                    done = not wait([copying], timeout=LOOK_S).not_done
                    error = copying.exception() if done else None
                    problem = (isinstance(error, ValueError), f"{platform.node()}: {error}") if error else None
                    states = self.group.gather((done, heard, problem, self.stop_requested()))
                    if states != before:
                        self.observe("staging", {"stage": None})
                        before = states
                    problems = [state[2] for state in states if state[2] is not None]
                    if problems:
                        kind = DataError if any(is_users for is_users, _ in problems) else NodeCopyFailed
                        raise kind("; ".join(sorted({said for _, said in problems}))) from error
                    if any(state[3] for state in states):
                        raise StopRequested(f"asked to stop while copying {path}; no step was lost")
                    if all(state[0] for state in states):
                        return copying.result()
            finally:
                given_up.set()

    def training_samples(self, loader: Loader) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(samples that are trained on, samples that are held out) of the training file."""
        data = self.recipe.data
        train_ids, held_out_ids = sampling.held_out(loader.num_samples, data.validation_images)
        return sampling.train_subset(train_ids, data.train_images), held_out_ids

    def folder(self, stage: Stage) -> Path:
        return self.run_folder / stage.name

    def close(self) -> None:
        self._resources.close()
