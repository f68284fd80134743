"""Time from importing a loader to its first batch: `python -m tests.bench.loader_start [FOLDER]`.

This project's loader and FFCV's own, each in a new process that imports it, creates a loader and reads its first batch,
and then creates another for a second file, as training and evaluation do. CPU time, which other load hardly affects.
Batches are 64 random resized crops of 64 x 64 pixels with flips.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from tests.bench.alternate import Seconds, parse_folder, ratio, write_results

FILES = (Path("data/fashion_mnist/train.beton"), Path("data/fashion_mnist/test.beton"))
"""The demo's data."""
BATCH, SIZE, THREADS, ROUNDS = 64, 64, 2, 3
DEADLINE_S = 600
OURS, STOCK = "this project's loader", "FFCV's Loader"
IMPORTS, FIRST, ANOTHER = "imports", "first loader", "another loader"


def ours() -> Callable[[Path], None]:
    """Import this project's loader; returns a function that reads a file's first batch."""
    from pipeline.data.loading import sampling
    from pipeline.data.loading.loader import Loader

    def first_batch(path: Path) -> None:
        with Loader(path, image_size=SIZE, threads=THREADS) as loader:
            ids = np.arange(BATCH)
            crops = sampling.random_resized_crops(ids, loader.heights[ids], loader.widths[ids], 0, 0)
            assert len(loader.read(ids, crops).ids) == BATCH

    return first_batch


def stock() -> Callable[[Path], None]:
    """The same with FFCV's loader."""
    from ffcv.fields.decoders import IntDecoder, RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import RandomHorizontalFlip, Squeeze, ToTensor, ToTorchImage

    def first_batch(path: Path) -> None:
        image = [RandomResizedCropRGBImageDecoder((SIZE, SIZE)), RandomHorizontalFlip(), ToTensor(), ToTorchImage()]
        pipelines = {"image": image, "label": [IntDecoder(), ToTensor(), Squeeze(1)]}
        indices = np.arange(BATCH).tolist()
        loader = Loader(str(path), BATCH, THREADS, order=OrderOption.SEQUENTIAL, indices=indices, pipelines=pipelines)
        assert [len(labels) for _, labels in loader] == [BATCH]

    return first_batch


LOADERS = {OURS: ours, STOCK: stock}


def in_this_process(which: str) -> dict[str, float]:
    """CPU seconds of each part."""
    times = [time.process_time()]
    first_batch = LOADERS[which]()
    times.append(time.process_time())
    for path in FILES:
        first_batch(path)
        times.append(time.process_time())
    return dict(zip((IMPORTS, FIRST, ANOTHER), np.diff(times).tolist(), strict=True))


def in_new_process(which: str) -> dict[str, float]:
    command = [sys.executable, "-m", "tests.bench.loader_start", which]
    done = subprocess.run(command, check=True, timeout=DEADLINE_S, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    folder = parse_folder(__doc__)
    seconds: Seconds = {f"{part}, {which}": [] for part in (IMPORTS, FIRST, ANOTHER) for which in LOADERS}
    for number in range(ROUNDS):
        for which in LOADERS if number % 2 else reversed(LOADERS):
            for part, cpu_seconds in in_new_process(which).items():
                seconds[f"{part}, {which}"].append(cpu_seconds)
    ratios = [
        ratio(f"{part}, FFCV's / ours", seconds, f"{part}, {STOCK}", f"{part}, {OURS}")
        for part in (IMPORTS, FIRST, ANOTHER)
    ]
    setting = f"fresh processes, batches of {BATCH} at {SIZE} px, {THREADS} threads, CPU time, {ROUNDS} rounds"
    write_results("loader-start", folder, setting, seconds, ratios, torch.device("cpu"))


if __name__ == "__main__":
    if sys.argv[1:] and sys.argv[1] in LOADERS:
        print(json.dumps(in_this_process(sys.argv[1])))
    else:
        main()
