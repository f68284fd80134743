"""The timings of `tests.bench.gpu_check`: images/s and ratios of ResNet-50's steps, for docs/scaling.md.

On a machine without a GPU a small network on few images, whose numbers mean nothing: the code is tried.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from decimal import Decimal
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.models.pruning.scores import Scores
from pipeline.models.state import train_only
from pipeline.recipe.threat_model import ThreatModel
from pipeline.robustness.attacks import LinfBall, crafting, pgd
from pipeline.robustness.noise import device_keys
from pipeline.robustness.objectives import ObjectiveInput
from pipeline.robustness.objectives.adversarial import adversarial_training, clean_training
from pipeline.robustness.objectives.base import Objective
from tests.bench.alternate import Seconds, alternate
from tests.bench.baseline import plain_step
from tests.bench.gpu_checks import IDS, Check, labels_of, network_of, random_images

EPS = 4 / 255
ARCH, SIZE, CLASSES = {"cpu": "resnet18", "cuda": "resnet50"}, {"cpu": 32, "cuda": 224}, 1000
MICRO_BATCHES = {"cpu": (2, 4), "cuda": (32, 128)}
ROUNDS = {"cpu": 1, "cuda": 8}
KEEP = Decimal("0.01")
ITERATIONS, QUERIES = 2, 20
"""Budgets of AutoAttack that are timed: 1/50 of the iterations, 1/250 of Square's queries."""


class Step:
    """One optimizer step on one micro-batch in bf16 through this project's objectives and masks, without DeepSpeed."""

    def __init__(self, where: torch.device, count: int, objective: Objective, prunes: bool = False) -> None:
        size = SIZE[where.type]
        self.network = network_of(ARCH[where.type], where, size, CLASSES)
        self.network.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        self.scores = Scores.attach(self.network, KEEP) if prunes else None
        train_only(self.network, "scores" if prunes else "weights")
        trained = [p for p in self.network.parameters() if p.requires_grad]
        self._optimizer = torch.optim.SGD(trained, lr=1e-3, momentum=0.9, fused=True)
        self._images, self._labels = random_images(count, size, where), labels_of(count, where, CLASSES)
        self._keys = device_keys(IDS.repeat(count // len(IDS) + 1)[:count], where, 0, "attack")
        self._objective, self._autocast = objective, partial(torch.autocast, where.type, torch.bfloat16)

    def _forward(self, images: Tensor) -> Tensor:
        with self._autocast():
            return self.network(images)

    def __call__(self) -> None:
        batch = ObjectiveInput(
            self.network, self._forward, self._images, self._labels, self._keys, autocast=self._autocast
        )
        self._objective(batch).loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        if self.scores is not None:
            self.scores.weights_changed()
            self.scores.refresh()


def _rates(seconds: Seconds, count: int) -> dict[str, float]:
    return {label: count / statistics.median(values) for label, values in seconds.items()}


def _steps(where: torch.device, count: int) -> str:
    size = SIZE[where.type]
    raw = torch.randint(256, (count, 3, size, size), dtype=torch.uint8, device=where)
    raw, labels = raw.contiguous(memory_format=torch.channels_last), labels_of(count, where, CLASSES)
    attack = adversarial_training(LinfBall(EPS), 2, EPS / 2)
    steps: dict[str, Callable[[], None]] = {
        "plain loop": plain_step(ARCH[where.type], raw, labels, 1, bf16=True, compiled=False),
        "clean": Step(where, count, clean_training),
        "PGD-2": Step(where, count, attack),
        "prune by PGD-2": Step(where, count, attack, prunes=True),
    }
    rates = _rates(alternate(steps, ROUNDS[where.type], where), count)
    passes = rates["clean"] / rates["PGD-2"]
    shares = f"PGD-2 takes {passes:.2f} clean steps ({(passes - 1) / 2:.2f} for an attack step)"
    prune = f"prune {rates['PGD-2'] / rates['prune by PGD-2']:.2f} of PGD-2"
    return "; ".join([*(f"{label} {rate:,.0f} images/s" for label, rate in rates.items()), shares, prune])


@contextmanager
def _nondeterministic() -> Iterator[None]:
    mode = torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode("default")
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(mode)


def _determinism(where: torch.device) -> str:
    step = Step(where, MICRO_BATCHES[where.type][-1], clean_training)

    def free() -> None:
        with _nondeterministic():
            step()

    rates = _rates(alternate({"deterministic": step, "not": free}, ROUNDS[where.type], where), 1)
    return f"deterministic algorithms take {rates['not'] / rates['deterministic']:.2f} times as long"


@contextmanager
def _tf32(allowed: bool) -> Iterator[None]:
    settings: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [setting.allow_tf32 for setting in settings]
    for setting in settings:
        setting.allow_tf32 = allowed
    try:
        yield
    finally:
        for setting, value in zip(settings, before, strict=True):
            setting.allow_tf32 = value


def _evaluation(where: torch.device) -> str:
    """PGD-2 in fp32, as finished networks are evaluated; TF32 is measured, and used nowhere."""
    count = MICRO_BATCHES[where.type][-1]

    def attack(network: nn.Module, images: Tensor, tf32: bool) -> None:
        labels = labels_of(count, where, CLASSES)
        with _tf32(tf32), crafting(network):
            pgd(
                network,
                images,
                lambda logits: nn.functional.cross_entropy(logits, labels, reduction="none"),
                ball=LinfBall(EPS),
                steps=2,
                step_size=EPS / 2,
                start=images,
            )

    functions = {}
    for memory, name in ((torch.channels_last, "NHWC"), (torch.contiguous_format, "NCHW")):
        network = network_of(ARCH[where.type], where, SIZE[where.type], CLASSES).to(memory_format=memory)  # pyright: ignore
        images = random_images(count, SIZE[where.type], where).contiguous(memory_format=memory)
        for tf32 in (False, True):
            functions[f"{name}{', TF32' if tf32 else ''}"] = partial(attack, network, images, tf32)
    rates = _rates(alternate(functions, ROUNDS[where.type], where), 2 * count)
    return "; ".join(f"{label} {rate:,.0f} passes/s" for label, rate in rates.items())


def _autoattack(where: torch.device) -> str:
    """An eps under which no image breaks, so that every attack meets all of them; scaled to the full budgets."""
    from pipeline.evaluation.measures.autoattack import ITERATIONS as ALL_ITERATIONS
    from pipeline.evaluation.measures.autoattack import QUERIES as ALL_QUERIES
    from pipeline.evaluation.measures.autoattack import Ensemble

    count = MICRO_BATCHES[where.type][0]
    threat_model = ThreatModel.model_validate({"norm": "linf", "eps": "1/1000000"})
    network = network_of(ARCH[where.type], where, SIZE[where.type], CLASSES).eval()
    images = random_images(count, SIZE[where.type], where)
    with torch.no_grad():
        labels = network(images).argmax(dim=1)

    def seconds_of(iterations: int, queries: int) -> float:
        ensemble = Ensemble("autoattack", threat_model, CLASSES, 0, iterations, queries)
        function = partial(ensemble.verdicts, network, images, labels, IDS.repeat(count)[:count])
        return statistics.median(alternate({"": function}, 1, where)[""]) / count

    base, more = seconds_of(ITERATIONS, QUERIES), seconds_of(2 * ITERATIONS, QUERIES)
    queried = seconds_of(ITERATIONS, 2 * QUERIES)
    total = (more - base) / ITERATIONS * ALL_ITERATIONS + (queried - base) / QUERIES * ALL_QUERIES
    return (
        f"about {total:.2f} s for an image that no attack breaks, from 1/{ALL_ITERATIONS // ITERATIONS} of the budgets"
    )


TIMINGS: list[Check] = [
    *(
        (f"steps at micro-batch {size}", (), partial(_steps, count=size))
        for size in MICRO_BATCHES["cuda" if torch.cuda.is_available() else "cpu"]
    ),
    ("price of determinism", (), _determinism),
    ("evaluation", (), _evaluation),
    ("AutoAttack's time", ("cuda", "pyautoattack"), _autoattack),
]
