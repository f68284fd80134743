"""Honesty checks: each catches a network that is built to fool it, and a soundly trained one passes them all."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.data.sources.fashion_mnist import IDX_FILES, find_fashion_mnist, read_idx
from pipeline.evaluation.honesty import probes as module
from pipeline.evaluation.honesty.checks import build_checks, exceeds, rises
from pipeline.evaluation.honesty.exported_file import mask_check, plain_network
from pipeline.evaluation.honesty.probes import Probes, radii
from pipeline.evaluation.measures.pgd import Pgd
from pipeline.evaluation.result import Check
from pipeline.models import Network, build_network
from pipeline.models.export import load_model, write_model
from pipeline.models.pruning.scores import Scores
from pipeline.models.state import effective_state
from pipeline.recipe.objective import ThreatModel
from pipeline.recipe.sections import Model
from pipeline.robustness.attacks import ball_of, crafting, pgd

LINF = ThreatModel(norm="linf", eps=Fraction(1, 10))
ATTACK = Pgd(LINF, steps=10, step_size=0.025, restarts=1, seed=0)
IMAGES, TRAINED_ON, EPOCHS = 100, 2000, 4
OWN = {"larger eps", "more steps", "one step", "another loss", "black box", "gradient", "slope", "repeatable", "logits"}
"""Checks that need nothing but the network."""


def small_images(count: int, part: str) -> tuple[Tensor, Tensor]:
    """Fashion-MNIST at half its size: [count, 1, 14, 14] and labels."""
    names, source = IDX_FILES[part], find_fashion_mnist(None)
    pixels = torch.from_numpy(read_idx(source, names[0], 3)[:count].copy()).float().div(255)
    labels = torch.from_numpy(read_idx(source, names[1], 1)[:count].copy()).long()
    return F.avg_pool2d(pixels[:, None], 2), labels


def per_sample(y: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda logits: F.cross_entropy(logits, y, reduction="none")


@pytest.fixture(scope="module")
def sound() -> nn.Module:
    """Trained on PGD examples for a second or two."""
    x, y = small_images(TRAINED_ON, "train")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        convolution = nn.Conv2d(1, 8, 3, stride=2, padding=1)
        network = nn.Sequential(convolution, nn.ReLU(), nn.Flatten(), nn.Linear(392, 64), nn.ReLU(), nn.Linear(64, 10))
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
        for rows in [part for _ in range(EPOCHS) for part in torch.randperm(TRAINED_ON).split(64)]:
            clean, labels, ball = x[rows], y[rows], ball_of(LINF)
            start = (clean + 0.1 * (2 * torch.rand_like(clean) - 1)).clamp(0, 1)
            hard = pgd(network, clean, per_sample(labels), ball=ball, steps=3, step_size=0.05, start=start)
            optimizer.zero_grad()
            F.cross_entropy(network(hard), labels).backward()
            optimizer.step()
    return network


@pytest.fixture(scope="module")
def tested() -> tuple[Tensor, Tensor]:
    return small_images(IMAGES, "test")


def found(network: nn.Module, tested: tuple[Tensor, Tensor], probes: Probes | None = None) -> dict[str, Check]:
    x, y = tested
    with crafting(network):
        columns = (probes or Probes(ATTACK)).verdicts(network, x, y, np.arange(len(x)))
    listed = build_checks({name: column.numpy() for name, column in columns.items()})
    assert len({check.name for check in listed}) == len(listed)
    return {check.name: check for check in listed}


def warned(found: dict[str, Check]) -> set[str]:
    return {name for name, check in found.items() if check.status == "warn"}


def test_a_soundly_trained_network_passes(sound: nn.Module, tested: tuple[Tensor, Tensor]) -> None:
    x, y = tested
    listed = found(sound, tested)
    assert listed.keys() == OWN
    assert warned(listed) == set(), listed
    standing = ATTACK.verdicts(sound, x, y, np.arange(IMAGES))["robust_correct"]
    assert 40 <= int(standing.sum()) <= 80  # otherwise it had nothing to pass
    assert f"of the {int(standing.sum())} images" in listed["black box"].figure
    assert all(check.meaning.endswith((".", "it")) and check.figure for check in listed.values())


class Before(nn.Module):
    """Something that is done to images before a network sees them."""

    def __init__(self, change: Callable[[Tensor], Tensor], network: nn.Module) -> None:
        super().__init__()
        self.change, self.network = change, network

    def forward(self, images: Tensor) -> Tensor:
        return self.network(self.change(images))


class After(Before):
    def forward(self, images: Tensor) -> Tensor:
        return self.change(self.network(images))


def rounded(x: Tensor) -> Tensor:
    return (x * 8).round() / 8


def black_or_white(x: Tensor) -> Tensor:
    """With a made-up gradient, that of x itself."""
    return x + (x.round() - x).detach()


def rippled(x: Tensor) -> Tensor:
    """x, but for ripples of a thousandth whose slope is right on the grid of pixel values and anything beside it."""
    waves = 4 * 255 * 2 * math.pi  # average pooling made quarters
    return x + 6.0 * torch.sin(waves * x) / waves


def noisy(x: Tensor) -> Tensor:
    return x + 0.1 * torch.randn_like(x)


FOOLING: dict[str, tuple[Callable[[nn.Module], nn.Module], set[str]]] = {
    "quantised": (lambda sound: Before(rounded, sound), {"gradient", "black box"}),
    "black or white": (lambda sound: Before(black_or_white, sound), {"slope"}),
    "rippled": (lambda sound: Before(rippled, sound), {"slope", "one step"}),
    "noisy": (lambda sound: Before(noisy, sound), {"repeatable"}),
    "saturated": (lambda sound: After(lambda logits: 1000 * logits, sound), {"gradient", "another loss", "black box"}),
    "probabilities": (lambda sound: After(lambda logits: logits.softmax(dim=1), sound), {"logits"}),
    "collapsed": (lambda sound: After(lambda logits: 0 * logits, sound), {"larger eps", "gradient"}),
    "not finite": (lambda sound: After(lambda logits: logits / 0.0, sound), {"gradient", "repeatable"}),
}


@pytest.mark.parametrize("kind", FOOLING)
def test_a_network_built_to_fool_is_caught(kind: str, sound: nn.Module, tested: tuple[Tensor, Tensor]) -> None:
    build, expected = FOOLING[kind]
    listed = found(build(sound), tested)
    assert warned(listed) >= expected, listed


def test_an_attack_that_has_not_converged_is_caught(sound: nn.Module, tested: tuple[Tensor, Tensor]) -> None:
    timid = Probes(replace(ATTACK, steps=5, step_size=0.002))
    assert "more steps" in warned(found(sound, tested, timid))


# --- the file --------------------------------------------------------------------------------------------------------

TINY = Model(arch="small_cnn", num_classes=10, mean=(0.3, 0.3, 0.3), std=(0.35, 0.35, 0.35))
QUICK = Pgd(LINF, steps=1, step_size=0.1, restarts=1, seed=0)


def live_network() -> Network:
    network = build_network(TINY, seed=0, image_size=14)
    Scores.attach(network, Decimal("0.1"))
    return network.eval()


def against(path: Path, live: nn.Module) -> dict[str, Check]:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.rand(16, 3, 14, 14, generator=generator), torch.arange(16) % 10
    return found(load_model(path), (x, y), Probes(QUICK, (live, plain_network(path))))


def exported(path: Path, live: Network, changed: dict[str, Tensor] | None = None, model: Model = TINY) -> Path:
    write_model(path, effective_state(live) | (changed or {}), model, {"keep_fraction": "0.1", "image_size": 14})
    return path


def test_a_file_of_the_live_network_passes(tmp_path: Path) -> None:
    live = live_network()
    path = exported(tmp_path / "model.safetensors", live)
    listed = against(path, live)
    assert listed.keys() == OWN | {"exported file"}
    assert listed["exported file"].status == "pass"
    check = mask_check(path)
    assert check.status == "pass"
    kept = sum(int(masked.count_nonzero()) for name, masked in effective_state(live).items() if masked.dim() > 1)
    total = sum(masked.numel() for masked in effective_state(live).values() if masked.dim() > 1)
    assert f"{kept:,} of {total:,} connections" in check.figure
    assert 0.1 <= kept / total < 0.101


def test_a_wrong_normalisation_is_caught(tmp_path: Path) -> None:
    live = live_network()
    other = TINY.model_copy(update={"std": (0.36, 0.35, 0.35)})
    path = exported(tmp_path / "model.safetensors", live, model=other)
    assert against(path, live)["exported file"].status == "warn"
    assert mask_check(path).status == "pass"


def test_normalisation_that_the_loaded_network_lacks_is_caught(tmp_path: Path) -> None:
    """Images go in as the metadata says, so a plain network disagrees with one that forgets it."""
    live = live_network()
    path = exported(tmp_path / "model.safetensors", live)
    x, y = torch.rand(8, 3, 14, 14, generator=torch.Generator().manual_seed(0)), torch.arange(8)
    bare = load_model(path).backbone
    assert found(bare, (x, y), Probes(QUICK, (plain_network(path),)))["exported file"].status == "warn"


def test_a_mask_that_is_not_applied_is_caught(tmp_path: Path) -> None:
    live = live_network()
    dense = build_network(TINY, seed=0, image_size=14).backbone.state_dict()
    path = exported(tmp_path / "model.safetensors", live, dense)
    assert mask_check(path).status == "warn"
    assert against(path, live)["exported file"].status == "warn"


def test_one_connection_too_many_is_caught(tmp_path: Path) -> None:
    live = live_network()
    weight = effective_state(live)["fc2.weight"].detach().clone()
    row, column = (weight == 0).nonzero()[0].tolist()
    weight[row, column] = 1e-3
    assert mask_check(exported(tmp_path / "a.safetensors", live, {"fc2.weight": weight})).status == "warn"
    weight[row, column], (row, column) = 0.0, weight.nonzero()[0].tolist()
    weight[row, column] = 0.0  # a kept connection may be zero
    assert mask_check(exported(tmp_path / "b.safetensors", live, {"fc2.weight": weight})).status == "pass"


def test_a_dense_file_keeps_all(tmp_path: Path) -> None:
    network = build_network(TINY, seed=0, image_size=14)
    write_model(tmp_path / "m.safetensors", effective_state(network), TINY, {"keep_fraction": None, "image_size": 14})
    assert mask_check(tmp_path / "m.safetensors").status == "pass"


# --- the curve and the thresholds ------------------------------------------------------------------------------------


def columns_of(curve: list[np.ndarray], standing: np.ndarray) -> dict[str, Any]:
    """Verdicts of an honest network but for its curve, over radii 0, 1, ..."""
    n = len(standing)
    yes, zero = np.ones(n, dtype=bool), np.zeros(n, dtype=np.float32)
    withstands = {f"withstands_{name}": standing for name in ("longer", "one_step", "margin", "square")}
    columns = {"robust_correct": standing, **{f"at {i}": column for i, column in enumerate(curve)}, **withstands}
    return columns | {"dead_gradient": ~yes, "follows_gradient": yes, "repeat_gap": zero, "probabilities": ~yes}


def first(count: int, of: int = 100) -> np.ndarray:
    return np.arange(of) < count


@pytest.mark.parametrize(
    ("counts", "verdict"),
    [
        ([80, 60, 30, 0], "pass"),
        ([80, 60, 60, 0], "pass"),
        ([80, 60, 69, 0], "pass"),  # 9 more may be chance, 10 are not
        ([80, 60, 70, 0], "warn"),
        ([80, 60, 30, 3], "pass"),  # 3 of 80 at the largest radius may be chance, 4 are not
        ([80, 60, 30, 4], "warn"),
        ([80, 80, 80, 80], "warn"),
    ],
)
def test_the_curve_must_fall_to_nothing(counts: list[int], verdict: str) -> None:
    (check,) = [c for c in build_checks(columns_of([first(n) for n in counts], first(60))) if c.name == "larger eps"]
    assert check.status == verdict, check
    assert f"{counts[0]} % at 0, {counts[1]} % at 1" in check.figure


@pytest.mark.parametrize(
    ("column", "name", "least"),
    [
        ("withstands_longer", "more steps", 8),
        ("withstands_one_step", "one step", 5),
        ("withstands_square", "black box", 5),
        ("withstands_margin", "another loss", 13),
    ],
)
def test_other_attacks_are_counted_on_what_pgd_left(column: str, name: str, least: int) -> None:
    """The numbers of the docstring, for 60 images."""
    curve = [first(80), first(60), first(0)]
    for broken, verdict in ((least - 1, "pass"), (least, "warn")):
        columns = columns_of(curve, first(60)) | {column: first(60 - broken)}
        (check,) = [c for c in build_checks(columns) if c.name == name]
        assert check.status == verdict
        assert check.figure.startswith(f"{broken} of the 60 images")
        assert {c.name for c in build_checks(columns) if c.status == "warn"} <= {name}


def test_a_network_that_withstands_nothing_passes() -> None:
    assert {c.status for c in build_checks(columns_of([first(0)] * 3, first(0)))} == {"pass"}


@given(st.integers(0, 150), st.data())
def test_exceeds_is_a_binomial_tail(total: int, data: st.DataObject) -> None:
    count, percent = data.draw(st.integers(0, total)), data.draw(st.integers(1, 50))
    p = Fraction(percent, 100)
    tail = sum(math.comb(total, k) * p**k * (1 - p) ** (total - k) for k in range(count, total + 1))
    assert exceeds(count, total, percent / 100) == (tail < Fraction(1, 100))


@given(st.integers(0, 60), st.integers(0, 60), st.integers(0, 40))
def test_rises_is_a_sign_test_of_the_images_that_differ(gained: int, lost: int, both: int) -> None:
    kinds = np.repeat([0, 1, 2], [gained, lost, both])
    tail = Fraction(sum(math.comb(gained + lost, k) for k in range(gained, gained + lost + 1)), 2 ** (gained + lost))
    assert rises(kinds != 0, kinds != 1) == (tail < Fraction(1, 1000))


# --- the probes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_on_a_linear_network_the_curve_is_that_of_the_margin(norm: str) -> None:
    """Two classes: right within r of x exactly if the margin is more than r times the dual norm of its gradient."""
    generator = torch.Generator().manual_seed(0)
    x = 0.5 + 0.08 * torch.randn(IMAGES, 1, 6, 6, generator=generator).clamp(-1, 1)
    weight = torch.randn(36, generator=generator)
    linear = nn.Linear(36, 2)
    with torch.no_grad():
        linear.weight.copy_(torch.stack([weight, -weight]) / 2)
        linear.bias.copy_(torch.stack([-weight.sum(), weight.sum()]) / 4)
    network = nn.Sequential(nn.Flatten(), linear)
    score = ((x - 0.5).flatten(1).double() @ weight.double()).numpy()
    dual = float(weight.double().abs().sum() if norm == "linf" else weight.double().norm())
    eps = Fraction(round(1e6 * float(np.median(np.abs(score))) / dual), 10**6)
    threat_model = ThreatModel(norm=norm, eps=eps)  # pyright: ignore[reportArgumentType]
    probes = Probes(Pgd(threat_model, steps=20, step_size=float(eps) / 8, restarts=1, seed=0))
    with crafting(network):
        columns = probes.verdicts(network, x, torch.from_numpy(score < 0).long(), np.arange(IMAGES))
    distance = np.abs(score) / dual
    for label, radius in [("0", 0.0), *radii(threat_model, x.shape[1:]).items()][:-1]:
        expected = distance > radius
        assert expected.sum() > 0 or radius > eps
        near = np.abs(distance - radius) < 0.02 * radius + 1e-7  # within what the last steps of PGD leave open
        assert np.array_equal(columns[f"at {label}"].numpy()[~near], expected[~near]), label
        assert near.sum() <= 4
    assert 0 < int(columns["robust_correct"].sum()) < IMAGES
    assert bool(columns["follows_gradient"].all())
    assert not bool(columns["dead_gradient"].any())


@given(st.sampled_from(["linf", "l2"]), st.fractions(Fraction(1, 1000), Fraction(3, 4)), st.integers(1, 30))
def test_radii_rise_to_one_at_which_every_image_may_be_grey(norm: Any, eps: Fraction, side: int) -> None:
    found = radii(ThreatModel(norm=norm, eps=eps), torch.Size([3, side, side]))
    values = list(found.values())
    assert values == sorted(set(values))
    farthest = torch.zeros(3, side, side).double() - 0.5
    distance = float(farthest.abs().max() if norm == "linf" else farthest.norm())
    assert values[-1] >= distance * (1 - 1e-9)
    assert all(found[label] == pytest.approx(float(Fraction(label) * eps)) for label in list(found)[:-1])
    assert ("1" in found) == (float(eps) < distance)


def test_the_margin_is_the_largest_wrong_logit_less_the_right_one() -> None:
    logits, y = torch.randn(50, 7, generator=torch.Generator().manual_seed(0)), torch.arange(50) % 7
    expected = [max(row[:k] + row[k + 1 :]) - row[k] for row, k in zip(logits.tolist(), y.tolist(), strict=True)]
    assert torch.allclose(module._margin(logits, y), torch.tensor(expected), rtol=0, atol=1e-6)


def test_columns_repeat_and_belong_to_the_images(sound: nn.Module, tested: tuple[Tensor, Tensor]) -> None:
    """Whatever random state the caller has, which is left alone. Square's numbers are the chunk's."""
    x, y = tested[0][:24], tested[1][:24]
    ids = np.arange(24) + 7

    def judge(rows: slice) -> dict[str, Tensor]:
        with crafting(sound):
            return Probes(ATTACK).verdicts(sound, x[rows], y[rows], ids[rows])

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        before = torch.random.get_rng_state()
        whole = judge(slice(24))
        assert torch.equal(before, torch.random.get_rng_state())
        torch.manual_seed(2)
        again = judge(slice(24))
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    halves = [judge(slice(12)), judge(slice(12, 24))]
    for name in whole.keys() - {"withstands_square", "repeat_gap"}:
        joined = torch.cat([half[name] for half in halves])
        assert int((joined != whole[name]).sum()) <= 1, name  # rounding may tip one that is on the edge


@pytest.mark.parametrize(("norm", "side"), [("linf", 3), ("l2", 14), ("l2", 24), ("l2", 25), ("l2", 32)])
def test_square_is_given_no_images_too_small_for_it(norm: Any, side: int) -> None:
    x = torch.rand(4, 1, side, side, generator=torch.Generator().manual_seed(0))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Flatten(), nn.Linear(side * side, 2))
    probes = Probes(replace(QUICK, threat_model=ThreatModel(norm=norm, eps=Fraction(1, 1000))))
    y = network(x).argmax(dim=1)  # so that there is something to attack
    expected = OWN if norm == "linf" or side >= 25 else OWN - {"black box"}
    assert found(network, (x, y), probes).keys() == expected


def test_l2(sound: nn.Module, tested: tuple[Tensor, Tensor]) -> None:
    attack = Pgd(ThreatModel(norm="l2", eps=Fraction(1)), steps=10, step_size=0.25, restarts=1, seed=0)
    larger = tested[0].repeat_interleave(2, dim=2).repeat_interleave(2, dim=3), tested[1]
    network = Before(lambda x: F.avg_pool2d(x, 2), sound)
    assert warned(found(network, larger, Probes(attack))) == set()
    assert {"gradient", "black box"} <= warned(found(Before(rounded, network), larger, Probes(attack)))
