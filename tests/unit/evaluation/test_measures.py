"""Evaluation: exact counts, the worst case over restarts, and the same verdicts for any number of workers."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.data.loading.loader import Loader
from pipeline.distributed import Group
from pipeline.evaluation.chunks import ChunkStore
from pipeline.evaluation.images import EvaluationImages
from pipeline.evaluation.measures.base import Verdicts, summarise
from pipeline.evaluation.measures.pgd import Pgd
from pipeline.evaluation.runner import EvaluationHooks, Evaluator
from pipeline.recipe.objective import ThreatModel
from pipeline.recipe.sections import Evaluation
from pipeline.rng import sample_keys
from pipeline.robustness.attacks import ball_of, pgd
from pipeline.run.stop import StopRequested

SIDE, IMAGES, CHUNK, WORLD = 28, 300, 64, 3
CPU = torch.device("cpu")
ALONE = Group(0, 1, CPU)
LINF = ThreatModel(norm="linf", eps=Fraction(1, 20))
# Few and small steps, so that the random start matters.
ATTACK = Pgd(LINF, steps=2, step_size=0.01, restarts=1, seed=0)
DEADLINE_S = 60


@dataclass(frozen=True)
class InThreads(Group):
    """Ranks as threads of this process."""

    meeting: threading.Barrier
    values: dict[int, Any]

    def gather(self, value: Any) -> list[Any]:
        self.values[self.rank] = value
        self.meeting.wait(DEADLINE_S)
        values = [self.values[rank] for rank in range(self.world)]
        self.meeting.wait(DEADLINE_S)
        return values

    def broadcast(self, value: Any) -> Any:
        return self.gather(value)[0]


@pytest.fixture(scope="module")
def loader(fashion_data: Path) -> Iterator[Loader]:
    with Loader(fashion_data / "test.beton", image_size=SIDE, threads=1) as opened:
        yield opened


def first_images(loader: Loader, count: int = IMAGES) -> EvaluationImages:
    return EvaluationImages(loader, "none", np.arange(count))


class Hooks(EvaluationHooks):
    """Records callbacks; requests a stop after the given chunk or before the given pass."""

    def __init__(self, stop_after_chunk: int | None = None, stop_at_pass: int | None = None) -> None:
        self.chunks: list[tuple[int, int]] = []
        self.passes = 0
        self._stop_after_chunk, self._stop_at_pass = stop_after_chunk, stop_at_pass

    def chunk_done(self, done: int, total: int) -> None:
        self.chunks.append((done, total))

    def pass_begins(self) -> None:
        self.passes += 1

    def stop_requested(self) -> bool:
        return len(self.chunks) == self._stop_after_chunk or self.passes == self._stop_at_pass


@pytest.fixture(scope="module")
def network(loader: Loader) -> nn.Module:
    """A smoothed nearest-class-mean classifier as a two-layer network, about two thirds accurate."""
    ids = np.arange(IMAGES, loader.num_samples)
    images, labels = loader.read(ids, first_images(loader).crops(ids)).to(CPU)
    pixels = images.flatten(1)
    means = torch.stack([pixels[labels == label].mean(dim=0) for label in range(10)])
    linear = nn.Linear(pixels.shape[1], 10)
    with torch.no_grad():
        linear.weight.copy_(means)
        linear.bias.copy_(-0.5 * means.square().sum(dim=1))
    return nn.Sequential(nn.Flatten(), linear, nn.Dropout(0.5))


def evaluate(network: nn.Module, loader: Loader, attack: Pgd = ATTACK) -> Verdicts:
    return Evaluator(first_images(loader), ALONE).verdicts(network, attack, CHUNK)


def differing(a: Verdicts, b: Verdicts) -> list[str]:
    assert a.keys() == b.keys()
    return [name for name in a if not np.array_equal(a[name], b[name])]


@pytest.mark.slow
def test_verdicts_do_not_depend_on_the_number_of_workers(network: nn.Module, loader: Loader) -> None:
    expected = evaluate(network, loader)
    meeting, values = threading.Barrier(WORLD), {}
    hooks = [Hooks() for _ in range(WORLD)]

    def rank(number: int) -> Verdicts:
        group = InThreads(number, WORLD, CPU, meeting, values)
        evaluator = Evaluator(first_images(loader), group, hooks[number])
        return evaluator.verdicts(copy.deepcopy(network), ATTACK, CHUNK)

    with ThreadPoolExecutor(WORLD) as pool:
        per_rank = list(pool.map(rank, range(WORLD), timeout=DEADLINE_S))
    for verdicts in per_rank:
        assert differing(verdicts, expected) == []
    assert [each.chunks for each in hooks] == [[(1, 2), (2, 2)], [(1, 2), (2, 2)], [(1, 1)]]
    other = evaluate(network, loader, replace(ATTACK, seed=1))
    assert differing(other, expected)  # so that the equality above is not vacuous


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_an_image_is_robust_if_correct_clean_and_under_every_restart(
    network: nn.Module, loader: Loader, norm: str
) -> None:
    threat_model = LINF if norm == "linf" else ThreatModel(norm="l2", eps=Fraction(1))
    attack = replace(ATTACK, threat_model=threat_model, restarts=4, step_size=0.01 if norm == "linf" else 0.1)
    verdicts = evaluate(network, loader, attack)
    ids = np.arange(IMAGES)
    x, y = loader.read(ids, first_images(loader).crops(ids)).to(CPU)
    ball = ball_of(threat_model)
    plain = copy.deepcopy(network).eval()
    with torch.no_grad():
        right = [plain(x).argmax(dim=1) == y]
    for restart in range(4):
        keys = torch.from_numpy(sample_keys(ids, 0, "evaluate", restart).view(np.int64))
        start = ball.random_start(x, keys)
        x_adv = pgd(
            plain,
            x,
            lambda logits: F.cross_entropy(logits, y, reduction="none"),
            ball=ball,
            steps=attack.steps,
            step_size=attack.step_size,
            start=start,
        )
        with torch.no_grad():
            right.append(plain(x_adv).argmax(dim=1) == y)
    # Chunks of another size round differently, which may flip a borderline image.
    assert (verdicts["robust_correct"] != torch.stack(right).all(dim=0).numpy()).sum() <= 1
    assert np.array_equal(verdicts["clean_correct"], right[0].numpy())
    once = evaluate(network, loader, replace(attack, restarts=1))["robust_correct"]
    assert 0 < verdicts["robust_correct"].sum() < once.sum() < verdicts["clean_correct"].sum() < IMAGES
    assert not (verdicts["robust_correct"] & ~once).any()


def test_the_columns_agree_with_each_other_and_with_the_file(network: nn.Module, loader: Loader) -> None:
    verdicts = evaluate(network, loader)
    assert np.array_equal(verdicts["sample_id"], np.arange(IMAGES))
    assert np.array_equal(verdicts["label"], loader.labels[:IMAGES])
    assert np.array_equal(verdicts["clean_correct"], verdicts["clean_prediction"] == verdicts["label"])
    for better, worse in (
        ("clean_top5", "clean_correct"),
        ("robust_top5", "robust_correct"),
        ("clean_correct", "robust_correct"),
        ("clean_top5", "robust_top5"),
    ):
        assert not (verdicts[worse] & ~verdicts[better]).any()
        assert verdicts[better].sum() > verdicts[worse].sum()


class Constant(nn.Module):
    """Equal logits for every class of ten."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(1))

    def forward(self, images: Tensor) -> Tensor:
        return (self.scale * images.flatten(1).sum(dim=1, keepdim=True)).expand(-1, 10)


def test_ties_go_by_class_order(loader: Loader) -> None:
    """So a constant network has a top-1 accuracy of one class in ten, and a top-5 accuracy of five."""
    verdicts = evaluate(Constant(), loader)
    labels = loader.labels[:IMAGES]
    assert (verdicts["clean_prediction"] == 0).all()
    for kind in ("clean", "robust"):
        assert np.array_equal(verdicts[f"{kind}_correct"], labels == 0)
        assert np.array_equal(verdicts[f"{kind}_top5"], labels < 5)


def test_without_a_threat_model_nothing_is_attacked(network: nn.Module, loader: Loader) -> None:
    verdicts = evaluate(network, loader, replace(ATTACK, threat_model=None))
    assert np.array_equal(verdicts["robust_correct"], verdicts["clean_correct"])
    assert np.array_equal(verdicts["robust_top5"], verdicts["clean_top5"])


def test_counts_are_exact_and_the_network_is_unchanged(network: nn.Module, loader: Loader) -> None:
    network.train()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    verdicts = evaluate(network, loader)
    assert all(module.training for module in network.modules())
    assert all(parameter.grad is None for parameter in network.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    summary = summarise(verdicts)
    assert summary["images"] == IMAGES
    for count, column in (
        ("clean_correct", "clean_correct"),
        ("clean_top5_correct", "clean_top5"),
        ("robust_correct", "robust_correct"),
        ("robust_top5_correct", "robust_top5"),
    ):
        correct = sum(bool(verdict) for verdict in verdicts[column])
        assert type(summary[count]) is int
        assert summary[count] == correct
        interval = summary[count.removesuffix("_correct") + "_accuracy"]
        assert interval["value"] == correct / IMAGES
        assert interval["low"] < interval["value"] < interval["high"]


class Interrupted(RuntimeError):
    """Kills an evaluation."""


class Killing(Hooks):
    def chunk_done(self, done: int, total: int) -> None:
        if done == 2:
            raise Interrupted


@pytest.mark.parametrize("hooks", [Hooks(stop_after_chunk=2), Killing()], ids=["stopped", "killed"])
def test_an_interrupted_evaluation_continues_with_the_next_chunk(
    network: nn.Module, loader: Loader, tmp_path: Path, hooks: EvaluationHooks
) -> None:
    images, header = first_images(loader), {"model_sha256": "m"}
    store = ChunkStore(tmp_path / "pgd.chunks", header)
    with pytest.raises((StopRequested, Interrupted)):
        Evaluator(images, ALONE, hooks).verdicts(network, ATTACK, CHUNK, store)
    assert len(list(tmp_path.glob("pgd.chunks/chunk-*"))) == 2
    (tmp_path / "pgd.chunks" / "chunk-000001.parquet").write_bytes(b"PAR1")  # a truncated file is not a chunk
    second = Hooks()
    verdicts = Evaluator(images, ALONE, second).verdicts(network, ATTACK, CHUNK, ChunkStore(store.folder, header))
    assert [total for _, total in second.chunks] == [4] * 4  # of five
    assert differing(verdicts, evaluate(network, loader)) == []
    store.remove()
    assert list(tmp_path.iterdir()) == []


def test_a_stop_abandons_the_current_chunk(network: nn.Module, loader: Loader, tmp_path: Path) -> None:
    hooks = Hooks(stop_at_pass=10)  # a chunk has one clean pass and three attacked ones
    store = ChunkStore(tmp_path / "chunks", {})
    with pytest.raises(StopRequested):
        Evaluator(first_images(loader), ALONE, hooks).verdicts(network, ATTACK, CHUNK, store)
    assert hooks.passes == 10
    kept = store.open()
    assert kept.keys() == {0, 1}
    network(torch.zeros(1, 3, SIDE, SIDE))
    assert hooks.passes == 10, "the network still has a hook"


def test_a_finished_worker_waits_for_files_outside_collectives(
    network: nn.Module, loader: Loader, tmp_path: Path
) -> None:
    """Collectives time out, and a chunk may take longer: here the second rank's lasts until the first one waits."""
    meeting, values, waited = threading.Barrier(2), {}, threading.Event()

    class Meeting(Hooks):
        def __init__(self, number: int) -> None:
            super().__init__()
            self.number = number

        def pass_begins(self) -> None:
            if self.number == 0 and self.chunks:
                waited.set()
            if self.number == 1:
                assert waited.wait(DEADLINE_S)
                assert values[0] == {}, "the first rank does not wait for files"  # the broadcast's value, no verdicts

    def rank(number: int) -> Verdicts:
        group, store = InThreads(number, 2, CPU, meeting, values), ChunkStore(tmp_path / "chunks", {})
        evaluator = Evaluator(first_images(loader, 2 * CHUNK), group, Meeting(number))
        return evaluator.verdicts(copy.deepcopy(network), ATTACK, CHUNK, store)

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(rank, range(2), timeout=2 * DEADLINE_S)
    assert differing(first, second) == []
    assert len(first["sample_id"]) == 2 * CHUNK


def test_waiting_workers_notice_that_another_has_stopped(network: nn.Module, loader: Loader, tmp_path: Path) -> None:
    meeting, values = threading.Barrier(2), {}

    def rank(number: int) -> None:
        group, store = InThreads(number, 2, CPU, meeting, values), ChunkStore(tmp_path / "chunks", {})
        hooks = Hooks(stop_after_chunk=1 if number == 1 else None)
        with pytest.raises(StopRequested):
            Evaluator(first_images(loader, 4 * CHUNK), group, hooks).verdicts(
                copy.deepcopy(network), ATTACK, CHUNK, store
            )

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(rank, range(2), timeout=2 * DEADLINE_S))
    assert ChunkStore(tmp_path / "chunks", {}).open().keys() == {0, 1, 2}


def test_chunks_of_another_network_or_attack_are_ignored(network: nn.Module, loader: Loader, tmp_path: Path) -> None:
    done = []
    for header in ({"model_sha256": "m"}, {"model_sha256": "m"}, {"model_sha256": "other"}):
        hooks, store = Hooks(), ChunkStore(tmp_path / "chunks", header)
        Evaluator(first_images(loader), ALONE, hooks).verdicts(network, ATTACK, CHUNK, store)
        done.append(len(hooks.chunks))
    assert done == [5, 0, 5]


def test_no_images_is_an_error(network: nn.Module, loader: Loader) -> None:
    with pytest.raises(ValueError, match="no image to evaluate"):
        Evaluator(first_images(loader, 0), ALONE).verdicts(network, ATTACK, CHUNK)


def test_the_recipe_determines_the_attack() -> None:
    evaluation = Evaluation(steps=9, step_size=Fraction(1, 8), restarts=3)
    assert Pgd.of(LINF, evaluation, 5) == Pgd(LINF, 9, 0.125, 3, 5)
