"""What sharding and keeping verdicts costs: AutoAttack through `evaluate.chunks` against direct calls of the library.

    python -m tests.bench.evaluation FILE

FILE is a test set that `data write` made. One process, one thread, the demo's network after a few steps of training,
the same chunks with the same seeds, in turn: images/s of both and their ratio, the median over pairs. Budgets are a
tenth of the standard ones, so that what is done once per chunk weighs ten times as much as it does in earnest.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from pyautoattack import AutoAttack
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.data.loader import Loader
from pipeline.data.order import whole_image_crops
from pipeline.evaluate.autoattack import ENSEMBLES, ITERATIONS, QUERIES, Ensemble, EnsembleName
from pipeline.evaluate.chunks import ChunkStore, evaluate
from pipeline.group import Group
from pipeline.models import build_network
from pipeline.recipe_objective import ThreatModel
from pipeline.recipe_sections import Model

CHUNK, CHUNKS, PAIRS = 10, 2, 3
THREAT = ThreatModel(norm="linf", eps=Fraction(1, 50))


def crops(ids: np.ndarray) -> np.ndarray:
    sides = np.full(len(ids), 28)
    return whole_image_crops(sides, sides)


def pixels(loader: Loader, ids: np.ndarray) -> tuple[Tensor, Tensor]:
    batch = loader.read(ids, crops(ids))
    return batch.images.float().div(255).contiguous(), batch.labels


def trained(loader: Loader) -> nn.Module:
    """Good enough not to be broken at once; it learns from images that are not attacked."""
    network = build_network(Model(arch="small_cnn", num_classes=10), seed=0, image_size=28).train()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
    for first in range(CHUNK * CHUNKS, CHUNK * CHUNKS + 40 * 50, 50):
        x, y = pixels(loader, np.arange(first, first + 50))
        optimizer.zero_grad()
        F.cross_entropy(network(x), y).backward()
        optimizer.step()
    return network.eval()


def compare(name: EnsembleName, network: nn.Module, loader: Loader) -> None:
    measure = Ensemble(name, THREAT, 10, 0, iterations=ITERATIONS // 10, queries=QUERIES // 10)
    chunks = np.arange(CHUNK * CHUNKS).reshape(CHUNKS, CHUNK)

    def ours() -> np.ndarray:
        with tempfile.TemporaryDirectory() as folder:
            store, group = ChunkStore(Path(folder) / "chunks", {}), Group(0, 1, torch.device("cpu"))
            return evaluate(network, loader, chunks.ravel(), crops, measure, CHUNK, group, store=store)[
                "robust_correct"
            ]

    def direct() -> np.ndarray:
        robust = []
        for ids in chunks:
            x, y = pixels(loader, ids)
            library = AutoAttack(network, norm="Linf", eps=float(THREAT.eps), seed=measure.seed_of(ids))
            library.attacks_to_run = list(ENSEMBLES[name])
            library.apgd.n_iter = library.apgd_targeted.n_iter = library.fab.n_iter = measure.iterations
            library.square.n_queries = measure.queries
            _, answers = library.run_standard_evaluation(x, y, batch_size=CHUNK)
            robust.append((answers == y).numpy())
        return np.concatenate(robust)

    assert np.array_equal(ours(), direct())  # which also warms both up
    seconds: dict[str, list[float]] = {"ours": [], "direct": []}
    for pair in range(PAIRS):
        both = (("ours", ours), ("direct", direct))
        for label, run in both if pair % 2 else reversed(both):
            started = time.process_time()
            run()
            seconds[label].append(time.process_time() - started)
    ratio = statistics.median(d / o for o, d in zip(seconds["ours"], seconds["direct"], strict=True))
    rates = [CHUNK * CHUNKS / statistics.median(seconds[label]) for label in ("ours", "direct")]
    print(f"{name:<12} {rates[0]:>8.2f} {rates[1]:>8.2f} {ratio:>8.3f}")


def main() -> None:
    with Loader(Path(sys.argv[1]), image_size=28, threads=1) as loader:
        torch.set_num_threads(1)  # importing FFCV changes it
        network = trained(loader)
        print(f"{'images/s':<12} {'ours':>8} {'direct':>8} {'ratio':>8}")
        for name in ENSEMBLES:
            compare(name, network, loader)


if __name__ == "__main__":
    main()
