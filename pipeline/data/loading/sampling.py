"""Sample order and crops, as pure functions of (ids, seed, epoch); numpy only.

Both are derived from keyed hashes (`pipeline.rng`), not from a generator with state: any position of any epoch is
computed directly, so a resumed run, and a run on another number of workers, sees the same images.

A crop is a row (top, left, height, width, flip) of an int32 array [n, 5], in pixels of the stored image; the loader
resizes it to the network's input size and mirrors it where flip is 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from pipeline import rng

Ids = NDArray[np.int64]
Crops = NDArray[np.int32]
CropFunction = Callable[[Ids, int], Crops]
"""(ids [n], epoch) -> crops [n, 5]."""

PADDING = 4
"""Pixels of zeros on every side before a pad crop (He et al. 2016, section 4.2)."""
SCALE = (0.08, 1.0)
RATIO = (3 / 4, 4 / 3)
TRIES = 10
EVALUATION_RATIO = 224 / 256


def num_train_images(num_samples: int, validation_images: int, train_images: int | None) -> int:
    """How many images `held_out` and then `train_subset` leave to train on.

    Errors: ValueError unless 0 <= validation_images < num_samples and 1 <= train_images <= what is left.
    """
    if not 0 <= validation_images < num_samples:
        raise ValueError(
            f"data.validation_images {validation_images} leaves nothing to train on: the training file has "
            f"{num_samples} images; hold out fewer"
        )
    left = num_samples - validation_images
    if train_images is None:
        return left
    if not 1 <= train_images <= left:
        raise ValueError(
            f"data.train_images {train_images}: {left} images are left after holding out the validation "
            "images; ask for 1 up to that many, or null for all"
        )
    return train_images


def held_out(num_samples: int, validation_images: int) -> tuple[Ids, Ids]:
    """Split 0..num_samples-1 into (train_ids, validation_ids), both sorted int64; the split is the same for every seed.

    Errors: ValueError unless 0 <= validation_images < num_samples.
    """
    num_train_images(num_samples, validation_images, None)
    ids = _shuffled(np.arange(num_samples, dtype=np.int64), "held_out")
    return np.sort(ids[validation_images:]), np.sort(ids[:validation_images])


def train_subset(train_ids: Ids, train_images: int | None) -> Ids:
    """Choose `train_images` of the ids (None: all), sorted int64; the choice is the same for every seed.

    Errors: ValueError unless 1 <= train_images <= len(train_ids).
    """
    num_train_images(len(train_ids), 0, train_images)
    if train_images is None:
        return np.sort(train_ids)
    return np.sort(_shuffled(np.sort(train_ids), "train_subset")[:train_images])


def _shuffled(ids: Ids, purpose: str) -> Ids:
    # Seed 0 for every run: runs with different seeds are comparable only if they train and select on the same images.
    return ids[np.argsort(rng.sample_keys(ids, 0, purpose), kind="stable")]


def epoch_order(train_ids: Ids, seed: int, epoch: int) -> Ids:
    """The order in which one epoch visits the ids: a permutation of them, [n] int64."""
    return train_ids[np.argsort(rng.sample_keys(train_ids, seed, "order", epoch), kind="stable")]


def _draws(ids: Ids, seed: int, epoch: int, count: int) -> NDArray[np.float64]:
    return rng.uniforms(rng.sample_keys(ids, seed, "crop", epoch), count)


def pad_crops(ids: Ids, size: int, seed: int, epoch: int, flip: bool) -> Crops:
    """Random size x size windows of images of that size padded by 4: top and left in [-4, 4], outside is zero."""
    draws = _draws(ids, seed, epoch, 3)
    crops = np.empty((len(ids), 5), np.int32)
    crops[:, :2] = np.floor(draws[:, :2] * (2 * PADDING + 1)) - PADDING
    crops[:, 2:4] = size
    crops[:, 4] = (draws[:, 2] < 0.5) & flip
    return crops


def random_resized_crops(
    ids: Ids, heights: NDArray[np.integer], widths: NDArray[np.integer], seed: int, epoch: int
) -> Crops:
    """Random area, aspect ratio and flip (Szegedy et al. 2015, section 6), as in torchvision's RandomResizedCrop.

    Area fraction uniform in [0.08, 1], aspect ratio log-uniform in [3/4, 4/3]; the first of 10 tries that fits, or the
    largest central crop whose aspect ratio is in range. `heights` and `widths` [n] are the images' sizes in pixels.
    """
    draws = _draws(ids, seed, epoch, 4 * TRIES + 1)
    tries = draws[:, :-1].reshape(len(ids), TRIES, 4)
    image_height = heights.astype(np.int64)[:, None]
    image_width = widths.astype(np.int64)[:, None]

    area = (SCALE[0] + tries[:, :, 0] * (SCALE[1] - SCALE[0])) * (image_height * image_width)
    low, high = np.log(RATIO)
    aspect = np.exp(low + tries[:, :, 1] * (high - low))
    crop_width = np.rint(np.sqrt(area * aspect)).astype(np.int64)
    crop_height = np.rint(np.sqrt(area / aspect)).astype(np.int64)
    fits = (crop_width > 0) & (crop_width <= image_width) & (crop_height > 0) & (crop_height <= image_height)
    top = np.floor(tries[:, :, 2] * (image_height - crop_height + 1)).astype(np.int64)
    left = np.floor(tries[:, :, 3] * (image_width - crop_width + 1)).astype(np.int64)

    rows, first = np.arange(len(ids)), np.argmax(fits, axis=1)
    chosen = np.stack([a[rows, first] for a in (top, left, crop_height, crop_width)], axis=1)
    crops = np.empty((len(ids), 5), np.int32)
    crops[:, :4] = np.where(fits.any(axis=1)[:, None], chosen, _central(image_height[:, 0], image_width[:, 0]))
    crops[:, 4] = draws[:, -1] < 0.5
    return crops


def _central(height: NDArray[np.int64], width: NDArray[np.int64]) -> NDArray[np.int64]:
    """The largest central (top, left, height, width) [n, 4] whose aspect ratio is in range."""
    crop_height = np.where(width / height < RATIO[0], np.rint(width / RATIO[0]).astype(np.int64), height)
    crop_width = np.where(width / height > RATIO[1], np.rint(height * RATIO[1]).astype(np.int64), width)
    return np.stack([(height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width], axis=1)


def whole_image_crops(heights: NDArray[np.integer], widths: NDArray[np.integer]) -> Crops:
    """Crops [n, 5] of whole images, without flips."""
    crops = np.zeros((len(heights), 5), np.int32)
    crops[:, 2], crops[:, 3] = heights, widths
    return crops


def center_crops(
    heights: NDArray[np.integer], widths: NDArray[np.integer], size: int, ratio: float = EVALUATION_RATIO
) -> Crops:
    """Central squares [n, 5] that, resized to `size`, show what Resize(size / ratio) and CenterCrop(size) show."""
    side = np.rint(np.minimum(heights, widths).astype(np.int64) * (size / round(size / ratio))).astype(np.int64)
    side = np.maximum(side, 1)
    crops = np.zeros((len(side), 5), np.int32)
    crops[:, 0], crops[:, 1] = (heights - side) // 2, (widths - side) // 2
    crops[:, 2] = crops[:, 3] = side
    return crops


def training_crops(
    augmentation: str, heights: NDArray[np.integer], widths: NDArray[np.integer], size: int, seed: int
) -> CropFunction:
    """The recipe's augmentation as a function (ids, epoch) -> crops; heights and widths [num_samples] of the file.

    Errors: ValueError for an unknown augmentation, and for pad crops of images that are not size x size.
    """
    if augmentation == "random_resized_crop":
        return lambda ids, epoch: random_resized_crops(ids, heights[ids], widths[ids], seed, epoch)
    if augmentation == "none":
        return lambda ids, _: whole_image_crops(heights[ids], widths[ids])
    if augmentation not in ("pad_crop", "pad_crop_flip"):
        raise ValueError(f"data.augmentation {augmentation!r} is unknown")
    wrong = np.flatnonzero((heights != size) | (widths != size))
    if len(wrong):
        first = int(wrong[0])
        raise ValueError(
            f"data.augmentation {augmentation} needs images of data.image_size {size} x {size}: {len(wrong)} of "
            f"{len(heights)} are not (image {first} is {heights[first]} x {widths[first]}); use random_resized_crop"
        )
    flip = augmentation == "pad_crop_flip"
    return lambda ids, epoch: pad_crops(ids, size, seed, epoch, flip)


def evaluation_crops(augmentation: str, heights: NDArray[np.integer], widths: NDArray[np.integer], size: int) -> Crops:
    """The crops [n, 5] for evaluation: central if training uses random resized crops, else the whole image."""
    if augmentation == "random_resized_crop":
        return center_crops(heights, widths, size)
    return whole_image_crops(heights, widths)


def steps_per_epoch(train_images: int, batch_per_step: int, extra_per_step: int = 0) -> int:
    """Full steps in one epoch; the epoch omits images that do not fill a step. Errors: ValueError if no step is full.

    An epoch visits the data set's own images; a step takes batch_per_step - extra_per_step of them.
    """
    own_per_step = batch_per_step - extra_per_step
    if train_images < own_per_step:
        extra = f" and the {extra_per_step} extra ones per step" if extra_per_step else ""
        raise ValueError(
            f"batch.batch_per_step {batch_per_step} is more than the {train_images} training images{extra}: no step is "
            "full; lower it"
        )
    return train_images // own_per_step


class _Passes:
    """The extra images as one endless sequence: pass after pass over all of them, each in its own order.

    Passes are independent of epochs, so all extra images are seen equally often, however many of them an epoch uses.
    """

    def __init__(self, ids: Ids, seed: int) -> None:
        self._ids, self._seed = ids, seed
        self._order, self._number = ids, -1

    def at(self, start: int, count: int) -> Iterator[tuple[Ids, int]]:
        """Yield positions start..start+count-1 as (ids, pass number), one part per pass."""
        while count > 0:
            number, first = divmod(start, len(self._ids))
            if number != self._number:
                keys = rng.sample_keys(self._ids, self._seed, "extra_order", number)
                self._order, self._number = self._ids[np.argsort(keys, kind="stable")], number
            part = self._order[first : first + count]
            yield part, number
            start, count = start + len(part), count - len(part)


def training_plan(
    train_ids: Ids,
    crops: CropFunction,
    *,
    seed: int,
    start_step: int,
    stop_step: int,
    batch_per_step: int,
    micro_batch: int,
    rank: int = 0,
    world: int = 1,
    extra_ids: Ids | None = None,
    extra_per_step: int = 0,
) -> Iterator[tuple[Ids, Crops]]:
    """This rank's micro-batches (ids [micro_batch], crops [micro_batch, 5]) of steps start_step..stop_step-1.

    A step consists of micro-batches. Each takes the next ids of the epoch's order and then the next extra images, the
    same number in every micro-batch (Carmon et al. 2019, section 5: a fixed share of every batch). Rank r owns the r-th
    contiguous range of micro-batches, so the ranks' micro-batches, concatenated, are the same for every world size. An
    extra image is cropped by its pass, not by the epoch, in which it may occur twice.

    Errors: ValueError (at the call) if the step is not a multiple of the micro-batch, the number of micro-batches not
    of the workers, or the extra images not of the micro-batches; if there are no extra images although a step needs
    some, or a step has only extra images.
    """
    micro_batches = batch_per_step // micro_batch
    if batch_per_step % micro_batch or micro_batches % world:
        raise ValueError(
            f"batch_per_step {batch_per_step} is not divisible by micro_batch {micro_batch} times {world} workers"
        )
    if extra_per_step % micro_batches or not 0 <= extra_per_step < batch_per_step:
        raise ValueError(
            f"{extra_per_step} extra images of {batch_per_step} cannot be split evenly among micro-batches of "
            f"{micro_batch}"
        )
    if extra_per_step and (extra_ids is None or not len(extra_ids)):
        raise ValueError(
            "data.extra_fraction: the training file holds no extra images; write it with "
            "`python -m launch data write ... --extra FILE`, or set data.extra_fraction=null"
        )
    per_epoch = steps_per_epoch(len(train_ids), batch_per_step, extra_per_step)
    extra = extra_per_step // micro_batches
    own = micro_batch - extra
    passes = _Passes(train_ids if extra_ids is None else extra_ids, seed)

    def plan() -> Iterator[tuple[Ids, Crops]]:
        order, order_epoch = train_ids, -1
        for step in range(start_step, stop_step):
            epoch = step // per_epoch
            if epoch != order_epoch:
                order, order_epoch = epoch_order(train_ids, seed, epoch), epoch
            for n in range(rank * micro_batches // world, (rank + 1) * micro_batches // world):
                begin = ((step % per_epoch) * micro_batches + n) * own
                parts = [(order[begin : begin + own], epoch), *passes.at((step * micro_batches + n) * extra, extra)]
                ids = np.concatenate([part for part, _ in parts])
                yield ids, np.concatenate([crops(part, number) for part, number in parts])

    return plan()
