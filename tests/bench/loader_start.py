"""Time from importing a loader to its first batch: this project's against FFCV's own, each in a fresh process.

    python -m tests.bench.loader_start FILE [FILE ...]

FILEs are what `data write` makes; every one after the first is a further loader in the same process. Prints seconds of
wall clock (and of CPU, which other load on the machine does not disturb) for the imports and for each loader up to its
first batch, and images per second once warm: 64 images, random resized crops of 64 x 64 and flips, 2 threads.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator

import numpy as np
import torch

BATCH, SIZE, THREADS, BATCHES = 64, 64, 2, 20


def ours(paths: list[str]) -> Iterator[int]:
    """Yield after the imports; then for every file after its first batch, and the images read after its last."""
    from pipeline.data import order
    from pipeline.data.loader import Loader

    yield 0
    for path in paths:
        loader = Loader(path, image_size=SIZE, threads=THREADS)
        ids = np.arange(BATCH)
        crops = order.random_resized_crops(ids, loader.heights[ids], loader.widths[ids], 0, 0)
        loader.read(ids, crops)
        yield 0
        yield sum(len(batch.ids) for batch in loader.batches([(ids, crops)] * BATCHES))
        loader.close()


def stock(paths: list[str]) -> Iterator[int]:
    """The same with FFCV's loader."""
    from ffcv.fields.decoders import IntDecoder, RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import RandomHorizontalFlip, Squeeze, ToTensor, ToTorchImage

    yield 0
    for path in paths:
        image = [RandomResizedCropRGBImageDecoder((SIZE, SIZE)), RandomHorizontalFlip(), ToTensor(), ToTorchImage()]
        pipelines = {"image": image, "label": [IntDecoder(), ToTensor(), Squeeze(1)]}
        indices = np.tile(np.arange(BATCH), BATCHES).tolist()
        loader = Loader(path, BATCH, THREADS, order=OrderOption.SEQUENTIAL, indices=indices, pipelines=pipelines)
        for _ in loader:
            break
        yield 0
        yield sum(len(labels) for _, labels in loader)


def report(which: str, paths: list[str]) -> None:
    labels = ["imports", *(label for path in paths for label in (f"{path}: to the first batch", "then"))]
    steps = {"ours": ours, "stock": stock}[which](paths)
    for label in labels:
        wall, cpu = time.perf_counter(), time.process_time()
        images = next(steps)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        rate = f"{images / wall:,.0f} images/s" if images else f"{wall:.2f} s ({cpu:.2f} s CPU)"
        print(f"{which:5} {label}: {rate}")
    print(f"{which:5} torch threads afterwards: {torch.get_num_threads()}")


if __name__ == "__main__":
    if sys.argv[1] in ("ours", "stock"):
        report(sys.argv[1], sys.argv[2:])
    else:
        for loader in ("ours", "stock"):
            command = [sys.executable, "-m", "tests.bench.loader_start", loader, *sys.argv[1:]]
            subprocess.run(command, check=True, timeout=600)
