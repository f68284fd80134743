"""Measures networks on this machine: all of them in one process, alternately, as ratios to the dense one in torch."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib import metadata

import torch

from pipeline.deployment.alternation import alternate, ratios, spread
from pipeline.deployment.onnx_file import random_images
from pipeline.deployment.subjects import Subject
from pipeline.run.benchmark import RUNTIME_TITLES, Benchmark, BenchmarkEntry, Speed
from pipeline.run.provenance import processor_model

BATCHES = (1, 32)
"""Images: latency, throughput."""
PACKAGES = ("torch", "onnxruntime", "openvino")
CLOCKS = {False: time.process_time, True: time.perf_counter}
"""For one thread the CPU time of this process, which other load on the machine disturbs less; for several wall-clock
time."""
Progress = Callable[[str, int, int], None]
"""What is measured, rounds done, rounds in all."""


def run_benchmark(subjects: Sequence[Subject], on_round: Progress) -> Benchmark:
    """Measure `subjects`, the first of which is the reference.

    Errors: ValueError for images of different sizes, or a file that its runtime refuses.
    """
    reference, image_size = subjects[0], subjects[0].image_size
    for subject in subjects:
        if subject.image_size != image_size:
            raise ValueError(
                f"{subject.origin.network} takes images of {subject.image_size} pixels and {reference.origin.network} "
                f"of {image_size}; their speeds cannot be compared, so measure them separately"
            )
    cores = len(os.sched_getaffinity(0))
    speeds: list[list[Speed]] = [[] for _ in subjects]
    with _threads_restored():
        for threads in sorted({1, cores}):
            runners = [subject.opener(threads) for subject in subjects]
            for batch in BATCHES:
                images = random_images(batch, image_size, seed=0).numpy()
                what = f"batch {batch}, {threads} thread{'s' if threads > 1 else ''}"
                calls = [runner(images) for runner in runners]
                seconds = alternate(calls, partial(on_round, what), CLOCKS[threads > 1])
                for place, values in enumerate(seconds):
                    speeds[place].append(
                        Speed(
                            batch=batch,
                            threads=threads,
                            rounds=len(values),
                            seconds=spread(values),
                            times_as_fast=ratios(seconds[0], values),
                        )
                    )
    return Benchmark(
        created=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        processor=processor_model(),
        cores=cores,
        versions=_versions(),
        image_size=image_size,
        reference=f"{reference.origin.network} in {_title(reference)}",
        entries=tuple(_entry(s, reference, tuple(of_subject)) for s, of_subject in zip(subjects, speeds, strict=True)),
    )


def _entry(subject: Subject, reference: Subject, speeds: tuple[Speed, ...]) -> BenchmarkEntry:
    sizes = subject.sizes
    return BenchmarkEntry(
        **vars(subject.origin),
        file=sizes.name,
        sha256=sizes.sha256,
        runtime=subject.runtime,
        precision=subject.precision,
        size=sizes.size,
        compressed=sizes.compressed,
        times_smaller=reference.sizes.size / sizes.compressed,
        **vars(subject.cost),
        speeds=speeds,
    )


def _title(subject: Subject) -> str:
    layout = ", channels-last" if subject.runtime == "torch" else ""
    return f"{RUNTIME_TITLES[subject.runtime]}, {subject.precision}{layout}"


def _versions() -> dict[str, str]:
    """Of Python and the runtimes that are installed."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


@contextmanager
def _threads_restored() -> Iterator[None]:
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
