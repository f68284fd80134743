"""The overhead of sharding and storing verdicts: `python -m tests.bench.evaluation [FOLDER]`.

AutoAttack through `evaluation.runner`, compared with direct calls of the library: one process, one thread, the demo's
data and its network after a few steps of training, the same chunks with the same seeds. Budgets are a tenth of the
standard ones, so that the overhead per chunk weighs ten times as much as in a real evaluation.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from pyautoattack import AutoAttack
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.data.loading.loader import Loader
from pipeline.distributed import Group
from pipeline.evaluation.chunks import ChunkStore
from pipeline.evaluation.images import EvaluationImages
from pipeline.evaluation.measures.autoattack import ENSEMBLES, ITERATIONS, QUERIES, Ensemble, EnsembleName
from pipeline.evaluation.runner import Evaluator
from pipeline.models import build_network
from pipeline.recipe.objective import ThreatModel
from pipeline.recipe.sections import Model
from tests.bench.alternate import alternate, parse_folder, ratio, write_results

FILE = Path("data/fashion_mnist/test.beton")
"""The demo's test data."""
CHUNK, CHUNKS, ROUNDS = 10, 2, 3
THREAT = ThreatModel(norm="linf", eps=Fraction(1, 50))


def pixels(loader: Loader, ids: np.ndarray) -> tuple[Tensor, Tensor]:
    images, labels = loader.read(ids, EvaluationImages(loader, "none", ids).crops(ids)).to(torch.device("cpu"))
    return images.contiguous(), labels


def train_network(loader: Loader) -> nn.Module:
    """A network that attacks do not break at once; it trains on other images than those attacked."""
    network = build_network(Model(arch="small_cnn", num_classes=10), seed=0, image_size=28).train()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
    for first in range(CHUNK * CHUNKS, CHUNK * CHUNKS + 40 * 50, 50):
        x, y = pixels(loader, np.arange(first, first + 50))
        optimizer.zero_grad()
        F.cross_entropy(network(x), y).backward()
        optimizer.step()
    return network.eval()


def attacks(name: EnsembleName, network: nn.Module, loader: Loader) -> dict[str, Callable[[], NDArray[np.bool_]]]:
    """The same attack through this project's chunks, and called directly."""
    measure = Ensemble(name, THREAT, 10, 0, iterations=ITERATIONS // 10, queries=QUERIES // 10)
    chunks = np.arange(CHUNK * CHUNKS).reshape(CHUNKS, CHUNK)

    def ours() -> NDArray[np.bool_]:
        with tempfile.TemporaryDirectory() as folder:
            store, group = ChunkStore(Path(folder) / "chunks", {}), Group(0, 1, torch.device("cpu"))
            evaluator = Evaluator(EvaluationImages(loader, "none", chunks.ravel()), group)
            return evaluator.verdicts(network, measure, CHUNK, store)["robust_correct"]

    def direct() -> NDArray[np.bool_]:
        robust = []
        for ids in chunks:
            x, y = pixels(loader, ids)
            library = AutoAttack(network, norm="Linf", eps=float(THREAT.eps), seed=measure.seed_of(ids))
            library.attacks_to_run = list(ENSEMBLES[name])
            library.apgd.n_iter = library.apgd_targeted.n_iter = library.fab.n_iter = measure.iterations
            library.square.n_queries = measure.queries
            _, predictions = library.run_standard_evaluation(x, y, batch_size=CHUNK)
            robust.append((predictions == y).numpy())
        return np.concatenate(robust)

    return {name: ours, f"{name}, called directly": direct}


def main() -> None:
    folder = parse_folder(__doc__)
    where, seconds, ratios = torch.device("cpu"), {}, []
    with Loader(FILE, image_size=28, threads=1) as loader:
        torch.set_num_threads(1)
        network = train_network(loader)
        for name in ENSEMBLES:
            functions = attacks(name, network, loader)
            ours, direct = (function() for function in functions.values())
            assert np.array_equal(ours, direct)
            seconds |= alternate(functions, ROUNDS, where)
            ratios.append(ratio(f"{name} called directly / in our chunks", seconds, f"{name}, called directly", name))
    setting = f"small_cnn, {CHUNKS} chunks of {CHUNK} images of Fashion-MNIST, a tenth of the budget, {ROUNDS} rounds"
    write_results("evaluation", folder, setting, seconds, ratios, where)


if __name__ == "__main__":
    main()
