"""The images of an evaluation: which samples of a file, each with one fixed crop."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from pipeline.data.loading.image_list import ListedImages
from pipeline.data.loading.loader import Batch, Loader
from pipeline.data.loading.sampling import evaluation_crops


@dataclass(frozen=True)
class EvaluationImages:
    """Samples `ids` [n] int64 of an FFCV file or of listed image files: a test set, a part of it, held-out images."""

    loader: Loader | ListedImages
    augmentation: str
    """data.augmentation, which determines the crop of an FFCV file's images; image files are cropped on reading."""
    ids: NDArray[np.int64]

    @staticmethod
    def all_of(loader: Loader | ListedImages, augmentation: str) -> EvaluationImages:
        return EvaluationImages(loader, augmentation, np.arange(loader.num_samples))

    def spread(self, count: int | None) -> EvaluationImages:
        """At most `count` images, evenly spread because a file may be sorted by class; None means all."""
        total = len(self.ids)
        if count is None or count >= total:
            return self
        return replace(self, ids=self.ids[np.arange(count) * total // count])

    def chunks(self, size: int) -> list[NDArray[np.int64]]:
        """The ids in chunks of `size`; the last may be smaller."""
        return [self.ids[start : start + size] for start in range(0, len(self.ids), size)]

    def crops(self, ids: NDArray[np.int64]) -> NDArray[np.int32]:
        """[n, 5], see `pipeline.data.loading.sampling`."""
        if isinstance(self.loader, ListedImages):
            return np.zeros((len(ids), 5), np.int32)
        loader = self.loader
        return evaluation_crops(self.augmentation, loader.heights[ids], loader.widths[ids], loader.image_size)

    def batches(self, chunks: Iterable[NDArray[np.int64]]) -> Generator[Batch]:
        """One batch per chunk of ids, prefetched and in order. Errors: those of the loader."""
        return self.loader.batches((ids, self.crops(ids)) for ids in chunks)
