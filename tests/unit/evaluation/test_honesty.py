"""Honesty checks: each catches a network built to violate it; an adversarially trained network passes all."""

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
"""Checks that need only the network."""


def small_images(count: int, part: str) -> tuple[Tensor, Tensor]:
    """Fashion-MNIST at half resolution: [count, 1, 14, 14] and labels."""
    names, source = IDX_FILES[part], find_fashion_mnist(None)
    pixels = torch.from_numpy(read_idx(source, names[0], 3)[:count].copy()).float().div(255)
    labels = torch.from_numpy(read_idx(source, names[1], 1)[:count].copy()).long()
    return F.avg_pool2d(pixels[:, None], 2), labels


def per_sample(y: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda logits: F.cross_entropy(logits, y, reduction="none")


@pytest.fixture(scope="module")
def sound() -> nn.Module:
    """Adversarially trained with PGD for a second or two."""
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
def eval_images() -> tuple[Tensor, Tensor]:
    return small_images(IMAGES, "test")


def checks_of(network: nn.Module, eval_images: tuple[Tensor, Tensor], probes: Probes | None = None) -> dict[str, Check]:
    x, y = eval_images
    with crafting(network):
        columns = (probes or Probes(ATTACK)).verdicts(network, x, y, np.arange(len(x)))
    listed = build_checks({name: column.numpy() for name, column in columns.items()})
    assert len({check.name for check in listed}) == len(listed)
    return {check.name: check for check in listed}


def warnings_of(checks: dict[str, Check]) -> set[str]:
    return {name for name, check in checks.items() if check.status == "warn"}


def test_an_adversarially_trained_network_passes(sound: nn.Module, eval_images: tuple[Tensor, Tensor]) -> None:
    x, y = eval_images
    listed = checks_of(sound, eval_images)
    assert listed.keys() == OWN
    assert warnings_of(listed) == set(), listed
    robust = ATTACK.verdicts(sound, x, y, np.arange(IMAGES))["robust_correct"]
    assert 40 <= int(robust.sum()) <= 80  # otherwise the checks are vacuous
    assert f"of the {int(robust.sum())} images" in listed["black box"].figure
    assert all(check.meaning.endswith((".", "it")) and check.figure for check in listed.values())


class Before(nn.Module):
    """A network behind a preprocessing of its images."""

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
    """With a straight-through gradient."""
    return x + (x.round() - x).detach()


def rippled(x: Tensor) -> Tensor:
    """x plus ripples of a thousandth, whose slope is correct only on the grid of pixel values."""
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
def test_gradient_masking_is_caught(kind: str, sound: nn.Module, eval_images: tuple[Tensor, Tensor]) -> None:
    build, expected = FOOLING[kind]
    listed = checks_of(build(sound), eval_images)
    assert warnings_of(listed) >= expected, listed


def test_an_unconverged_attack_is_caught(sound: nn.Module, eval_images: tuple[Tensor, Tensor]) -> None:
    timid = Probes(replace(ATTACK, steps=5, step_size=0.002))
    assert "more steps" in warnings_of(checks_of(sound, eval_images, timid))


# --- the file --------------------------------------------------------------------------------------------------------

TINY = Model(arch="small_cnn", num_classes=10, mean=(0.3, 0.3, 0.3), std=(0.35, 0.35, 0.35))
QUICK = Pgd(LINF, steps=1, step_size=0.1, restarts=1, seed=0)


def trained_network() -> Network:
    network = build_network(TINY, seed=0, image_size=14)
    Scores.attach(network, Decimal("0.1"))
    return network.eval()


def checks_against(path: Path, trained: nn.Module) -> dict[str, Check]:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.rand(16, 3, 14, 14, generator=generator), torch.arange(16) % 10
    return checks_of(load_model(path), (x, y), Probes(QUICK, (trained, plain_network(path))))


def export(path: Path, trained: Network, changed: dict[str, Tensor] | None = None, model: Model = TINY) -> Path:
    write_model(path, effective_state(trained) | (changed or {}), model, {"keep_fraction": "0.1", "image_size": 14})
    return path


def test_a_file_of_the_trained_network_passes(tmp_path: Path) -> None:
    trained = trained_network()
    path = export(tmp_path / "model.safetensors", trained)
    listed = checks_against(path, trained)
    assert listed.keys() == OWN | {"exported file"}
    assert listed["exported file"].status == "pass"
    check = mask_check(path)
    assert check.status == "pass"
    kept = sum(int(masked.count_nonzero()) for name, masked in effective_state(trained).items() if masked.dim() > 1)
    total = sum(masked.numel() for masked in effective_state(trained).values() if masked.dim() > 1)
    assert f"{kept:,} of {total:,} weights" in check.figure
    assert 0.1 <= kept / total < 0.101


def test_a_wrong_normalisation_is_caught(tmp_path: Path) -> None:
    trained = trained_network()
    other = TINY.model_copy(update={"std": (0.36, 0.35, 0.35)})
    path = export(tmp_path / "model.safetensors", trained, model=other)
    assert checks_against(path, trained)["exported file"].status == "warn"
    assert mask_check(path).status == "pass"


def test_normalisation_that_the_loaded_network_lacks_is_caught(tmp_path: Path) -> None:
    """The plain network normalises as the metadata says, so it disagrees with a network that does not."""
    trained = trained_network()
    path = export(tmp_path / "model.safetensors", trained)
    x, y = torch.rand(8, 3, 14, 14, generator=torch.Generator().manual_seed(0)), torch.arange(8)
    bare = load_model(path).backbone
    assert checks_of(bare, (x, y), Probes(QUICK, (plain_network(path),)))["exported file"].status == "warn"


def test_an_unapplied_mask_is_caught(tmp_path: Path) -> None:
    trained = trained_network()
    dense = build_network(TINY, seed=0, image_size=14).backbone.state_dict()
    path = export(tmp_path / "model.safetensors", trained, dense)
    assert mask_check(path).status == "warn"
    assert checks_against(path, trained)["exported file"].status == "warn"


def test_one_connection_too_many_is_caught(tmp_path: Path) -> None:
    trained = trained_network()
    weight = effective_state(trained)["fc2.weight"].detach().clone()
    row, column = (weight == 0).nonzero()[0].tolist()
    weight[row, column] = 1e-3
    assert mask_check(export(tmp_path / "a.safetensors", trained, {"fc2.weight": weight})).status == "warn"
    weight[row, column], (row, column) = 0.0, weight.nonzero()[0].tolist()
    weight[row, column] = 0.0  # a kept connection may be zero
    assert mask_check(export(tmp_path / "b.safetensors", trained, {"fc2.weight": weight})).status == "pass"


def test_a_file_of_blocks_may_keep_the_blocks_that_its_budget_is_rounded_to(tmp_path: Path) -> None:
    """1 % of the blocks of 256 of a small layer is one block, more than 1 % of its connections."""
    network = build_network(TINY, seed=0, image_size=14)
    Scores.attach(network, Decimal("0.01"), structure="16x16")
    metadata = {"keep_fraction": "0.01", "image_size": 14}
    for facts, status in ((metadata, "warn"), (metadata | {"structure": "16x16"}, "pass")):
        write_model(tmp_path / "m.safetensors", effective_state(network), TINY, facts)
        assert mask_check(tmp_path / "m.safetensors").status == status


def test_a_dense_file_keeps_all(tmp_path: Path) -> None:
    network = build_network(TINY, seed=0, image_size=14)
    write_model(tmp_path / "m.safetensors", effective_state(network), TINY, {"keep_fraction": None, "image_size": 14})
    assert mask_check(tmp_path / "m.safetensors").status == "pass"


# --- the curve and the thresholds ------------------------------------------------------------------------------------


def columns_of(curve: list[np.ndarray], robust: np.ndarray) -> dict[str, Any]:
    """Verdicts without symptoms except for the given curve, over radii 0, 1, ..."""
    n = len(robust)
    yes, zero = np.ones(n, dtype=bool), np.zeros(n, dtype=np.float32)
    rivals = {f"withstands_{name}": robust for name in ("longer", "one_step", "margin", "square")}
    columns = {"robust_correct": robust, **{f"at {i}": column for i, column in enumerate(curve)}, **rivals}
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
def test_other_attacks_run_on_images_robust_to_pgd(column: str, name: str, least: int) -> None:
    """The numbers of the docstring, for 60 images."""
    curve = [first(80), first(60), first(0)]
    for broken, verdict in ((least - 1, "pass"), (least, "warn")):
        columns = columns_of(curve, first(60)) | {column: first(60 - broken)}
        (check,) = [c for c in build_checks(columns) if c.name == name]
        assert check.status == verdict
        assert check.figure.startswith(f"{broken} of the 60 images")
        assert {c.name for c in build_checks(columns) if c.status == "warn"} <= {name}


def test_a_network_without_robust_images_passes() -> None:
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
    """Two classes: robust at radius r exactly if the margin exceeds r times the dual norm of its gradient."""
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
        near = np.abs(distance - radius) < 0.02 * radius + 1e-7  # within the precision of PGD's last steps
        assert np.array_equal(columns[f"at {label}"].numpy()[~near], expected[~near]), label
        assert near.sum() <= 4
    assert 0 < int(columns["robust_correct"].sum()) < IMAGES
    assert bool(columns["follows_gradient"].all())
    assert not bool(columns["dead_gradient"].any())


@given(st.sampled_from(["linf", "l2"]), st.fractions(Fraction(1, 1000), Fraction(3, 4)), st.integers(1, 30))
def test_the_last_radius_reaches_uniform_grey(norm: Any, eps: Fraction, side: int) -> None:
    radius_at = radii(ThreatModel(norm=norm, eps=eps), torch.Size([3, side, side]))
    values = list(radius_at.values())
    assert values == sorted(set(values))
    farthest = torch.zeros(3, side, side).double() - 0.5
    distance = float(farthest.abs().max() if norm == "linf" else farthest.norm())
    assert values[-1] >= distance * (1 - 1e-9)
    assert all(radius_at[label] == pytest.approx(float(Fraction(label) * eps)) for label in list(radius_at)[:-1])
    assert ("1" in radius_at) == (float(eps) < distance)


def test_the_margin_is_the_largest_wrong_logit_minus_the_true_one() -> None:
    logits, y = torch.randn(50, 7, generator=torch.Generator().manual_seed(0)), torch.arange(50) % 7
    expected = [max(row[:k] + row[k + 1 :]) - row[k] for row, k in zip(logits.tolist(), y.tolist(), strict=True)]
    assert torch.allclose(module._margin(logits, y), torch.tensor(expected), rtol=0, atol=1e-6)


def test_columns_are_deterministic_per_image(sound: nn.Module, eval_images: tuple[Tensor, Tensor]) -> None:
    """Independent of the global random state, which is preserved. Square is keyed by chunk."""
    x, y = eval_images[0][:24], eval_images[1][:24]
    ids = np.arange(24) + 7

    def probe_rows(rows: slice) -> dict[str, Tensor]:
        with crafting(sound):
            return Probes(ATTACK).verdicts(sound, x[rows], y[rows], ids[rows])

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        before = torch.random.get_rng_state()
        whole = probe_rows(slice(24))
        assert torch.equal(before, torch.random.get_rng_state())
        torch.manual_seed(2)
        again = probe_rows(slice(24))
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    halves = [probe_rows(slice(12)), probe_rows(slice(12, 24))]
    for name in whole.keys() - {"withstands_square", "repeat_gap"}:
        joined = torch.cat([half[name] for half in halves])
        assert int((joined != whole[name]).sum()) <= 1, name  # rounding may flip a borderline image


@pytest.mark.parametrize(("norm", "side"), [("linf", 3), ("l2", 14), ("l2", 24), ("l2", 25), ("l2", 32)])
def test_square_skips_images_that_are_too_small(norm: Any, side: int) -> None:
    x = torch.rand(4, 1, side, side, generator=torch.Generator().manual_seed(0))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Flatten(), nn.Linear(side * side, 2))
    probes = Probes(replace(QUICK, threat_model=ThreatModel(norm=norm, eps=Fraction(1, 1000))))
    y = network(x).argmax(dim=1)  # so that all images are correct
    expected = OWN if norm == "linf" or side >= 25 else OWN - {"black box"}
    assert checks_of(network, (x, y), probes).keys() == expected


def test_l2(sound: nn.Module, eval_images: tuple[Tensor, Tensor]) -> None:
    attack = Pgd(ThreatModel(norm="l2", eps=Fraction(1)), steps=10, step_size=0.25, restarts=1, seed=0)
    larger = eval_images[0].repeat_interleave(2, dim=2).repeat_interleave(2, dim=3), eval_images[1]
    network = Before(lambda x: F.avg_pool2d(x, 2), sound)
    assert warnings_of(checks_of(network, larger, Probes(attack))) == set()
    assert {"gradient", "black box"} <= warnings_of(checks_of(Before(rounded, network), larger, Probes(attack)))
