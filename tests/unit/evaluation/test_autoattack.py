"""AutoAttack as a measure: verdicts of a direct call, warnings of the library, unchanged process state."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pyautoattack
import pytest
import torch
from torch import Tensor, nn

from pipeline.evaluation.measures.autoattack import ENSEMBLES, FLAGS, Ensemble, EnsembleName
from pipeline.evaluation.measures.base import summarise
from tests.support.synthetic_data import BALLS, CLASSES, draw, trained_network

COUNT, FIRST = 48, 1000
IDS = np.arange(FIRST, FIRST + COUNT)
SHORT: dict[str, int] = {"iterations": 6, "queries": 60}


def measure(name: EnsembleName = "apgd", norm: str = "linf", **changes: Any) -> Ensemble:
    return Ensemble(name, BALLS[norm], CLASSES, seed=3, **{**SHORT, **changes})


@pytest.fixture(scope="module")
def network() -> nn.Module:
    return trained_network()


@pytest.fixture(scope="module")
def images() -> tuple[Tensor, Tensor]:
    return draw(COUNT, seed=1000)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("name", ENSEMBLES)
def test_verdicts_are_those_of_a_direct_call(
    network: nn.Module, images: tuple[Tensor, Tensor], name: EnsembleName, norm: str
) -> None:
    x, y = images
    ours = measure(name, norm)
    found = ours.verdicts(network, x, y, IDS)
    eps, seed = float(BALLS[norm].eps), ours.seed_of(IDS)
    library = pyautoattack.AutoAttack(network, norm="Linf" if norm == "linf" else "L2", eps=eps, seed=seed)
    library.attacks_to_run = list(ENSEMBLES[name])
    library.apgd.n_iter = library.apgd_targeted.n_iter = library.fab.n_iter = SHORT["iterations"]
    library.apgd_targeted.n_target_classes = library.fab.n_target_classes = CLASSES - 1
    library.square.n_queries = SHORT["queries"]
    _, answers = library.run_standard_evaluation(x, y, batch_size=COUNT)
    assert torch.equal(found["robust_correct"], answers == y)
    with torch.no_grad():
        assert torch.equal(found["clean_prediction"], network(x).argmax(dim=1))
    assert 0 < found["robust_correct"].sum() < found["clean_correct"].sum() < COUNT
    network.zero_grad()  # from the direct call; the measure leaves none, see below


def test_budgets_are_the_standard_versions(network: nn.Module) -> None:
    ours = Ensemble("autoattack", BALLS["linf"], 10, seed=0).library(network, torch.device("cpu"), 5)
    theirs = pyautoattack.AutoAttack(network, norm="Linf", eps=0.07, seed=5, device=torch.device("cpu"))
    assert ours.attacks_to_run == theirs.attacks_to_run
    for attack in ("apgd", "apgd_targeted", "fab", "square"):
        own, standard = vars(getattr(ours, attack)), vars(getattr(theirs, attack))
        assert own == standard
    few = Ensemble("apgd", BALLS["linf"], CLASSES, seed=0)
    assert few.settings["targets"] == CLASSES - 1
    assert few.library(network, torch.device("cpu"), 5).apgd_targeted.n_target_classes == CLASSES - 1


def test_parts_agree_with_the_full_ensemble(network: nn.Module, images: tuple[Tensor, Tensor]) -> None:
    x, y = images
    parts = {name: measure(name).verdicts(network, x, y, IDS) for name in ENSEMBLES}
    whole, apgd = parts["autoattack"], parts["apgd"]
    for attack in ENSEMBLES["apgd"]:
        assert torch.equal(whole[f"broken_{attack}"], apgd[f"broken_{attack}"])
    assert not (whole["robust_correct"] & ~apgd["robust_correct"]).any()
    for found in parts.values():
        verdicts = {"sample_id": IDS, **{name: column.numpy() for name, column in found.items()}}
        summary = summarise(verdicts)
        assert summary["robust_correct"] + sum(summary["broken_by"].values()) == summary["clean_correct"]
        assert summary["flags"] == dict.fromkeys([*FLAGS.values(), "other"], 0)
    assert parts["square"]["robust_correct"].sum() > apgd["robust_correct"].sum()


def test_random_numbers_are_keyed_by_chunk(network: nn.Module, images: tuple[Tensor, Tensor]) -> None:
    ours = measure()
    seeds = {measure.seed_of(ids) for measure in (ours, replace(ours, seed=4)) for ids in (IDS, IDS[1:])}
    assert len(seeds) == 4
    assert measure("square").seed_of(IDS) == ours.seed_of(IDS)
    x, y = images
    square = replace(measure("square"), queries=3)  # few enough that the draws matter
    first, again = (square.verdicts(network, x, y, IDS) for _ in range(2))
    other = square.verdicts(network, x, y, IDS + 1)
    assert torch.equal(first["robust_correct"], again["robust_correct"])
    assert not torch.equal(first["robust_correct"], other["robust_correct"])


def test_process_state_is_restored(
    network: nn.Module, images: tuple[Tensor, Tensor], capfd: pytest.CaptureFixture[str]
) -> None:
    x, y = images
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    torch.manual_seed(11)
    state = torch.get_rng_state()
    tracer = sys.gettrace()

    def mine(frame: Any, event: str, argument: Any) -> None:
        return None

    sys.settrace(mine)
    try:
        measure("autoattack").verdicts(network, x, y, IDS)
        assert sys.gettrace() is mine
    finally:
        sys.settrace(tracer)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.requires_grad and p.grad is None for p in network.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_images_may_be_channels_last(network: nn.Module, images: tuple[Tensor, Tensor], norm: str) -> None:
    x, y = images
    mean = nn.Conv2d(3, 1, 1, bias=False)
    nn.init.constant_(mean.weight, 1 / 3)
    grey = nn.Sequential(mean, network)
    coloured = x.expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)
    found = measure("autoattack", norm).verdicts(grey, coloured, y, IDS)
    expected = measure("autoattack", norm).verdicts(grey, coloured.contiguous(), y, IDS)
    assert torch.equal(found["robust_correct"], expected["robust_correct"])


def test_chunks_of_one_image_and_without_correct_images(network: nn.Module, images: tuple[Tensor, Tensor]) -> None:
    x, y = images
    with torch.no_grad():
        answers = network(x).argmax(dim=1)
    right, wrong = (answers == y).nonzero()[0], (answers != y).nonzero()[0]
    ours = measure("autoattack")
    one = ours.verdicts(network, x[right], y[right], IDS[:1])
    assert one["clean_correct"].tolist() == [True]
    none = ours.verdicts(network, x[wrong], y[wrong], IDS[:1])
    assert (none["clean_correct"] | none["robust_correct"]).tolist() == [False]


class Suspicious(nn.Module):
    """A network with a component that AutoAttack warns of, before or after it."""

    def __init__(self, network: nn.Module, kind: str) -> None:
        super().__init__()
        self.network, self.kind = network, kind

    def forward(self, images: Tensor) -> Tensor:
        if self.kind == "randomised":
            images = images + 0.01 * torch.randn_like(images)
        if self.kind in ("zero_gradient", "square_stronger"):
            images = (images * 8).round() / 8
        if self.kind == "dynamic":
            with torch.enable_grad():
                moved = images.detach().requires_grad_()
                (gradient,) = torch.autograd.grad(self.network(moved).logsumexp(dim=1).sum(), moved)
            images = images + 0.01 * gradient.sign()
        logits = self.network(images)
        return logits.softmax(dim=1) if self.kind == "probabilities" else logits


@pytest.mark.parametrize("kind", FLAGS.values())
def test_warnings_become_flags(network: nn.Module, images: tuple[Tensor, Tensor], kind: str) -> None:
    x, y = images
    found = measure("autoattack").verdicts(Suspicious(network, kind), x, y, IDS)
    assert found[f"flag_{kind}"].all()
    assert not found["flag_other"].any()
    sound = measure("apgd").verdicts(network, x, y, IDS)  # even right after one that raises flags
    assert not any(sound[f"flag_{flag}"].any() for flag in FLAGS.values())
