"""The perturbation that each training image had in its last epoch, from which FGSM-PGI starts.

Values are multiples of eps / 127, one byte each: float32 would take four times the memory, and rounding moves a start
by at most eps / 254, equally on every worker. They belong to pixels of the image and not of its crop, so they follow
the image through other crops and flips. A pixel outside the last crop keeps its value; padding starts at 0.

An image occurs at most once per epoch, so no worker reads what others wrote before the next epoch. Every worker holds
the whole memory in CPU memory, and they exchange what they wrote when an epoch begins and for a checkpoint. Checkpoints
are therefore complete, and a run can resume at any step on any number of workers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.data.loading.sampling import PADDING, CropFunction
from pipeline.distributed import Group, to_device
from pipeline.robustness.noise import uniform_noise

VALUES, EPOCHS = "memory/perturbation", "memory/epoch"
LEVELS = 127
"""Levels of a perturbation between 0 and eps."""
EXCHANGED = 1024
"""Images that each worker sends in one collective, which bounds what the device holds of them."""

Rows = NDArray[np.int64]
"""Places of images in the memory."""
Windows = list[NDArray[np.int8]]
"""Views [3, s, s] of padded images, through each one's crop and flip."""


class PerturbationMemory:
    """The perturbations of all training images; none at the start of a stage."""

    prefix = "memory/"

    def __init__(
        self,
        group: Group,
        train_ids: NDArray[np.int64],
        crops: CropFunction,
        *,
        image_size: int,
        first_epoch: int,
        steps_per_epoch: int,
        reset_epochs: int,
    ) -> None:
        """`train_ids`: sorted. `crops`: at most `PADDING` pixels beyond an image. `first_epoch`: that of the stage."""
        self._group, self._train_ids, self._crops = group, train_ids, crops
        self._first_epoch, self._steps_per_epoch, self._reset_epochs = first_epoch, steps_per_epoch, reset_epochs
        self._values = np.zeros((len(train_ids), 3, image_size, image_size), np.int8)
        self._epochs = np.full(len(train_ids), -1, np.int32)
        """Epoch of the stage in which each was written; -1: never."""
        self._epoch = 0
        self._lent: tuple[Rows, NDArray[np.int8], Windows, Tensor] | None = None
        """Rows, padded images, windows and noise of the last `of`; the noise may have been written to since."""
        self._unsent: list[Rows] = []
        """What this worker has written and the others do not have."""

    def of(self, micro_batch: int, ids: Tensor, keys: Tensor, step: int) -> Tensor:
        """The perturbations of images in their crops: [n, 3, s, s] float32 in [-1, 1], in units of eps; a copy.

        An image that has none since the last reset gets uniform noise of its key. What is in the tensor when `of` or
        `state` is called next is kept. Collective at the first step of an epoch.
        """
        self._keep()
        epoch = step // self._steps_per_epoch
        if epoch != self._epoch:
            self._exchange()
            self._epoch = epoch
        rows = np.searchsorted(self._train_ids, ids.numpy())
        without = np.flatnonzero(self._epochs[rows] < epoch - epoch % self._reset_epochs)
        self._values[rows[without]] = 0
        padded = np.pad(self._values[rows], [(0, 0), (0, 0), (PADDING, PADDING), (PADDING, PADDING)])
        windows = self._windows(padded, ids.numpy())
        noise = to_device(torch.from_numpy(np.stack(windows)), keys.device) / LEVELS
        if len(without):
            places = to_device(torch.from_numpy(without), keys.device)
            noise[places] = 2.0 * uniform_noise(keys[places], noise.shape[1:]) - 1.0
        self._lent = rows, padded, windows, noise
        return noise

    def _windows(self, padded: NDArray[np.int8], ids: NDArray[np.int64]) -> Windows:
        crops, size = self._crops(ids, self._first_epoch + self._epoch), self._values.shape[-1]
        windows = []
        for image, (top, left, _, _, flip) in zip(padded, crops, strict=True):
            first_row, first_column = PADDING + top, PADDING + left
            window = image[:, first_row : first_row + size, first_column : first_column + size]
            windows.append(window[:, :, ::-1] if flip else window)
        return windows

    def _keep(self) -> None:
        """Write the noise that was lent to its images."""
        if self._lent is None:
            return
        rows, padded, windows, noise = self._lent
        self._lent = None
        levels = (noise * LEVELS).round().clamp(-LEVELS, LEVELS).to("cpu", torch.int8).numpy()
        for window, values in zip(windows, levels, strict=True):
            window[:] = values
        self._values[rows] = padded[:, :, PADDING:-PADDING, PADDING:-PADDING]
        self._epochs[rows] = self._epoch
        self._unsent.append(rows)

    def _exchange(self) -> None:
        """Give every worker what the others wrote: of the same number of images each. Collective."""
        if not self._unsent:
            return
        unsent = np.concatenate(self._unsent)
        for rows in np.split(unsent, range(EXCHANGED, len(unsent), EXCHANGED)):
            everywhere = self._gathered(rows)
            self._values[everywhere] = self._gathered(self._values[rows])
            self._epochs[everywhere] = self._epoch
        self._unsent = []

    def _gathered(self, values: NDArray[Any]) -> NDArray[Any]:
        return self._group.gather_rows(to_device(torch.from_numpy(values), self._group.device)).cpu().numpy()

    def state(self) -> dict[str, Tensor]:
        """A copy of all perturbations [images, 3, s, s] int8, and of their epochs [images] int32. Collective."""
        self._keep()
        self._exchange()
        return {VALUES: torch.from_numpy(self._values.copy()), EPOCHS: torch.from_numpy(self._epochs.copy())}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Load what `state` returned, on any number of workers."""
        self._values[:], self._epochs[:] = tensors[VALUES].numpy(), tensors[EPOCHS].numpy()
