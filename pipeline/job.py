"""What the workers of one job share while they walk through its stages."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.data import order
from pipeline.data.loader import Loader
from pipeline.group import Group
from pipeline.loop import Observer, unobserved
from pipeline.phases import Stage
from pipeline.recipe import Recipe


@dataclass
class Job:
    """Recipe, run directory, process group, and one Loader per file and process."""

    recipe: Recipe
    run_folder: Path
    token: str
    group: Group
    observe: Observer = unobserved
    _loaders: dict[str, Loader] = field(default_factory=dict)
    _resources: ExitStack = field(default_factory=ExitStack)

    def loader(self, path: str) -> Loader:
        """One Loader per file and process, kept for all stages."""
        if path not in self._loaders:
            data = self.recipe.data
            loader = Loader(Path(path), image_size=data.image_size, threads=self.recipe.workers.threads)
            self._loaders[path] = self._resources.enter_context(loader)
            if len(loader.class_names) != self.recipe.model.num_classes:
                raise ValueError(
                    f"model.num_classes {self.recipe.model.num_classes}: {path} has {len(loader.class_names)} classes; "
                    f"set model.num_classes={len(loader.class_names)}"
                )
        return self._loaders[path]

    def evaluation_crops(self, loader: Loader) -> Callable[[NDArray[np.int64]], NDArray[np.int32]]:
        """Sample ids -> crops to evaluate with."""
        data = self.recipe.data

        def crops(ids: NDArray[np.int64]) -> NDArray[np.int32]:
            return order.evaluation_crops(data.augmentation, loader.heights[ids], loader.widths[ids], data.image_size)

        return crops

    def folder(self, stage: Stage) -> Path:
        return self.run_folder / stage.name

    def close(self) -> None:
        self._resources.close()
