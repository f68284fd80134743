"""Connection sensitivity: its definition by finite differences, independence of ranks, and no side effects."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from threading import Barrier

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.data.loading.loader import Batch
from pipeline.distributed import Group
from pipeline.models import Network, build_network
from pipeline.models.pruning.scores import maskable
from pipeline.models.state import named_state
from pipeline.recipe.sections import Model
from pipeline.rng import sample_keys
from pipeline.robustness.attacks import LinfBall
from pipeline.robustness.noise import uniform_noise
from pipeline.robustness.objectives import ObjectiveInput, ObjectiveOutput
from pipeline.robustness.objectives.adversarial import adversarial_training
from pipeline.training.snip import connection_sensitivity

CPU = torch.device("cpu")
ALONE = Group(0, 1, CPU)


def batches(count: int, size: int = 6) -> list[Batch]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, size, 3, 12, 12), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, 4, (count, size), generator=generator)
    ids = torch.arange(count * size).view(count, size)
    return [Batch(*batch) for batch in zip(images, labels, ids, strict=True)]


def small_network() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = [nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten(), nn.Linear(400, 4)]
        return nn.Sequential(*layers)


def noisy(batch: ObjectiveInput) -> ObjectiveOutput:
    """An objective whose loss depends on images, labels and keys."""
    noise = uniform_noise(batch.keys, batch.x.shape[1:])
    logits = batch.forward((batch.x + 0.1 * noise).to(next(batch.network.parameters()).dtype))
    return ObjectiveOutput(F.cross_entropy(logits, batch.y), None, None)


def test_it_is_how_fast_the_loss_changes_as_a_connection_fades_out() -> None:
    network, micro_batches = small_network().double(), batches(2)
    sensitivity = connection_sensitivity(
        network, micro_batches, noisy, nullcontext, ALONE, seed=5, stage="keep-0.1/snip"
    )
    weights = {name: layer.weight for name, layer in maskable(network).items()}
    assert sensitivity.keys() == weights.keys()

    def loss() -> float:
        network.train()
        total = 0.0
        for batch in micro_batches:
            drawn = sample_keys(batch.ids.numpy(), 5, "snip", "keep-0.1/snip").view(np.int64)
            noise = uniform_noise(torch.from_numpy(drawn), (3, 12, 12)).double()
            logits = network(batch.images.double() / 255 + 0.1 * noise)
            total += float(F.cross_entropy(logits, batch.labels).detach())
        return total

    step = 1e-5
    for name, weight in weights.items():
        assert isinstance(weight, Tensor)
        flat = weight.detach().view(-1)
        for index in range(0, flat.numel(), 37):
            kept = float(flat[index])
            flat[index] = kept * (1 + step)  # its mask, 1, moved a little
            ahead = loss()
            flat[index] = kept * (1 - step)
            behind = loss()
            flat[index] = kept
            actual = float(sensitivity[name].view(-1)[index])
            assert actual == pytest.approx(abs(ahead - behind) / (2 * step), rel=1e-4, abs=1e-9), name


@dataclass(frozen=True)
class InThreads(Group):
    """Ranks that are threads of this process."""

    meeting: Barrier
    sent: dict[int, Tensor]

    def sum(self, values: Tensor) -> Tensor:
        self.sent[self.rank] = values.clone()
        self.meeting.wait(60)
        values.copy_(torch.stack([self.sent[rank] for rank in range(self.world)]).sum(0))
        self.meeting.wait(60)
        return values


ATTACK = adversarial_training(LinfBall(0.1), 2, 0.05)


def test_it_does_not_depend_on_who_computes_which_micro_batch() -> None:
    micro_batches = batches(4)
    alone = connection_sensitivity(small_network(), micro_batches, ATTACK, nullcontext, ALONE, seed=0, stage="s")
    meeting, sent = Barrier(2), dict[int, Tensor]()
    networks = small_network(), small_network()  # not in the threads: weights are drawn from the process's generator

    def rank(number: int) -> dict[str, Tensor]:
        group, own = InThreads(number, 2, CPU, meeting, sent), micro_batches[2 * number : 2 * number + 2]
        return connection_sensitivity(networks[number], own, ATTACK, nullcontext, group, seed=0, stage="s")

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(rank, range(2), timeout=120)
    other = connection_sensitivity(small_network(), micro_batches, ATTACK, nullcontext, ALONE, seed=1, stage="s")
    for name, tensor in alone.items():
        torch.testing.assert_close(first[name], tensor, rtol=1e-4, atol=1e-7)
        assert torch.equal(first[name], second[name]), "ranks must hold the same masks"
        assert not torch.allclose(other[name], tensor, rtol=1e-3), "the attack's start is drawn from the seed"


def test_it_leaves_the_network_as_it_was() -> None:
    network: Network = build_network(Model(arch="small_cnn", num_classes=4), 0, 28)
    before = {name: tensor.clone() for name, tensor in named_state(network).items()}
    images = [Batch(F.pad(batch.images, (8, 8, 8, 8)), batch.labels, batch.ids) for batch in batches(2)]
    sensitivity = connection_sensitivity(network, images, ATTACK, nullcontext, ALONE, seed=0, stage="s")
    for name, tensor in named_state(network).items():
        assert torch.equal(tensor, before[name]), name
        assert tensor.grad is None
    assert all(tensor.dtype == torch.float32 and bool((tensor > 0).any()) for tensor in sensitivity.values())


def test_a_gradient_that_is_not_finite_is_named() -> None:
    network = small_network()
    with torch.no_grad():
        named_state(network)["weight/4.weight"][0, 0] = torch.inf
    with pytest.raises(ValueError, match=r"gradient is not finite, so snip cannot rank"):
        connection_sensitivity(network, batches(1), noisy, nullcontext, ALONE, seed=0, stage="s")
