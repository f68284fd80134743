"""Throughput of loaders: `python -m tests.bench.loader [FOLDER]`; writes JSON and a table into the folder.

Random resized crops and flips of real photographs, on the same cores: this project's loader, FFCV's own and
torchvision's DataLoader, each a whole epoch in turn; and TurboJPEG and OpenCV's resizing alone, in a loop over bytes in
memory. Wall clock, as all use threads or processes, so the machine must be idle. Then the share of time for which the
training loop's steps wait for this project's loader.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from itertools import cycle
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader
from torchvision import datasets, transforms

from pipeline.data.loading import sampling
from pipeline.data.loading.decoder import libffcv
from pipeline.data.loading.loader import Loader
from pipeline.data.manifest import check_structure, read_index
from pipeline.distributed import make_deterministic
from tests.bench.alternate import Ratio, Seconds, alternate, parse_folder, ratio, write_results
from tests.bench.photographs import photographs
from tests.bench.real_step import RealStep, alone, recipe_of

BATCH, SIZE, ROUNDS, AHEAD = 64, 224, 10, 4
DEADLINE_S = 120.0
THREADS = len(os.sched_getaffinity(0))
STEP_ARCH, STEP_BATCH, STEPS = "resnet18", 16, 12
OURS, STOCK, TORCHVISION = "this project's loader", "FFCV's Loader", "torchvision's DataLoader"
BYTES, RAW = "torchvision's DataLoader, bytes only", "decode and resize"


def _epoch(loader: Loader, epoch: int, batch: int) -> list[tuple[NDArray[np.int64], NDArray[np.int32]]]:
    """All images in a random order, as a loader's plan."""
    ids = sampling.epoch_order(np.arange(loader.num_samples), 0, epoch)
    crops = sampling.random_resized_crops(ids, loader.heights[ids], loader.widths[ids], 0, epoch)
    return [(ids[at : at + batch], crops[at : at + batch]) for at in range(0, len(ids), batch)]


def our_epochs(loader: Loader) -> Callable[[], None]:
    def epoch() -> None:
        assert sum(len(batch.ids) for batch in loader.batches(_epoch(loader, 0, BATCH))) == loader.num_samples

    return epoch


def _serve_stock(path: Path, requests: Connection) -> None:
    """Read an epoch with FFCV's loader at every request, and reply with its number of images."""
    from ffcv.fields.decoders import IntDecoder, RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import RandomHorizontalFlip, Squeeze, ToTensor, ToTorchImage

    image = [RandomResizedCropRGBImageDecoder((SIZE, SIZE)), RandomHorizontalFlip(), ToTensor(), ToTorchImage()]
    pipelines = {"image": image, "label": [IntDecoder(), ToTensor(), Squeeze(1)]}
    loader = Loader(
        str(path), BATCH, THREADS, order=OrderOption.RANDOM, seed=0, drop_last=False, os_cache=True, pipelines=pipelines
    )
    with suppress(EOFError):  # the benchmark has ended
        while requests.recv():
            requests.send(sum(len(labels) for _, labels in loader))


def stock_epochs(path: Path, count: int) -> Callable[[], None]:
    """Runs in its own process: FFCV changes types that numba shares, so this project's decoder would be recompiled."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    context.Process(target=_serve_stock, args=(path, there), daemon=True).start()

    def epoch() -> None:
        here.send(True)
        assert here.poll(DEADLINE_S), "FFCV's loader does not respond"
        assert here.recv() == count

    return epoch


def torchvision_epochs(folder: Path, floats: bool) -> Callable[[], None]:
    """Yields normalised floats, as torchvision's reference training script does, or bytes, as this project's loader."""
    normalize = transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    ending = [transforms.ConvertImageDtype(torch.float), normalize]
    transform = transforms.Compose(
        [
            transforms.RandomResizedCrop(SIZE),
            transforms.RandomHorizontalFlip(),
            transforms.PILToTensor(),
            *(ending if floats else []),
        ]
    )
    images = datasets.ImageFolder(folder, transform)
    loader: Any = DataLoader(images, BATCH, shuffle=True, num_workers=THREADS, persistent_workers=True)

    def epoch() -> None:
        assert sum(len(labels) for _, labels in loader) == len(images)

    return epoch


def raw_epochs(path: Path, loader: Loader) -> Callable[[], None]:
    """TurboJPEG and OpenCV, as FFCV builds them, over bytes in memory; each thread has its own part of the images."""
    imdecode, resize = libffcv.ctypes_imdecode, libffcv.ctypes_resize
    index = read_index(path, check_structure(path))
    stored = np.fromfile(path, np.uint8)
    offsets = index.samples["data_ptr"].astype(np.int64)
    sizes, heights, widths = index.sizes.astype(np.int64), loader.heights, loader.widths
    ids, crops = (np.concatenate(parts) for parts in zip(*_epoch(loader, 0, BATCH), strict=True))

    @numba.njit(nogil=True)
    def decode(stored, offsets, sizes, heights, widths, ids, crops, scratch, image):
        failed, start = 0, np.int64(stored.ctypes.data)
        source, target = np.int64(scratch.ctypes.data), np.int64(image.ctypes.data)
        for n in range(len(ids)):
            i = ids[n]
            h, w = heights[i], widths[i]
            failed += imdecode(start + offsets[i], sizes[i], h, w, source, h, w, 0, 0, 1, 1, False, False) != 0
            top, left, high, wide, _ = crops[n]
            resize(0, source, h, w, top, top + high, left, left + wide, target, SIZE, SIZE)
        return failed

    edges = [len(ids) * part // THREADS for part in range(THREADS + 1)]
    pool = ThreadPoolExecutor(THREADS)

    def part(begin: int, end: int) -> int:
        scratch = np.empty(3 * int((heights * widths).max()), np.uint8)
        image = np.empty((SIZE, SIZE, 3), np.uint8)
        return decode(stored, offsets, sizes, heights, widths, ids[begin:end], crops[begin:end], scratch, image)

    def epoch() -> None:
        assert sum(pool.map(part, edges[:-1], edges[1:])) == 0

    return epoch


def waiting_shares(loader: Loader) -> list[float]:
    """Share of each step's time for which it waits for images; one thread trains, and the others read."""
    torch.set_num_threads(1)
    plan = (batch for epoch in cycle([0]) for batch in _epoch(loader, epoch, STEP_BATCH) if len(batch[0]) == STEP_BATCH)
    batches = loader.batches(plan)
    recipe = recipe_of(STEP_ARCH, "clean", STEP_BATCH, 1, "fp32")
    step, shares = RealStep(recipe, alone(torch.device("cpu")), batches, "weights"), []
    for number in range(STEPS):
        step()
        times = step.clock.read()
        if number:  # no batch is ready for the first step
            shares.append(times["data"] / sum(times.values()))
    batches.close()
    torch.set_num_threads(THREADS)
    return shares


def main() -> None:
    folder = parse_folder(__doc__)
    make_deterministic(THREADS)
    where = torch.device("cpu")
    tree, file = photographs(Path("data/photographs"))
    with Loader(file, image_size=SIZE, threads=THREADS, ahead=AHEAD) as loader:
        functions = {
            OURS: our_epochs(loader),
            STOCK: stock_epochs(file, loader.num_samples),
            TORCHVISION: torchvision_epochs(tree, floats=True),
            BYTES: torchvision_epochs(tree, floats=False),
            RAW: raw_epochs(file, loader),
        }
        seconds: Seconds = alternate(functions, ROUNDS, where, wall_clock=True)
        shares = waiting_shares(loader)
        count, stored = loader.num_samples, read_index(file, check_structure(file)).sizes
    faster = partial(ratio, seconds=seconds, below=OURS)
    shares.sort()
    ratios = [
        faster(f"images/s against {STOCK}", above=STOCK, bound=">= 1.0"),
        faster(f"images/s against {TORCHVISION}", above=TORCHVISION, bound=">= 3.0"),
        faster(f"images/s against {BYTES}", above=BYTES, bound=""),
        faster("images/s against decode and resize alone", above=RAW, bound=">= 0.85"),
        Ratio(f"waiting for data, of a step ({STEP_ARCH})", shares[len(shares) // 2], shares[0], shares[-1], "<= 0.02"),
    ]
    setting = (
        f"{count} photographs of {stored.mean() / 1e3:.0f} kB an epoch, batches of {BATCH} at {SIZE} px, "
        f"{THREADS} threads or workers, page cache warm, {ROUNDS} rounds; the step has {STEP_BATCH} images"
    )
    write_results("loader", folder, setting, seconds, ratios, where)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
