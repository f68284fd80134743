"""A file that masks its gradient is caught and not stamped; a sound one is stamped."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pipeline.deployment.attack_result import FileAttackResult, attack_result
from pipeline.deployment.attacked_file import AttackedFile
from pipeline.deployment.file_attack import BLACK_BOX, GRADIENT, FileAttack
from pipeline.deployment.int8_file import write_int8
from pipeline.deployment.onnx_file import write_onnx
from pipeline.evaluation.measures.autoattack import Ensemble
from pipeline.evaluation.result import EvaluationHeader
from pipeline.models import Network
from pipeline.recipe.threat_model import ThreatModel

SIDE, EPS, STEEPNESS, COUNT = 8, Fraction(3, 20), 40.0, 32
CONTRAST, LITTLE = 0.06, 0.005
"""Of the images that are attacked, and of those that choose ranges which do not fit them."""


def steep_network() -> Network:
    """Its class is the brightest of four quadrants: logit k is STEEPNESS * (mean of quadrant k - 1/2), through ReLUs of
    it and of its negative."""
    hidden, out = nn.Linear(3 * SIDE * SIDE, 8), nn.Linear(8, 4)
    half, weight = SIDE // 2, torch.zeros(4, 3, SIDE, SIDE)
    for k in range(4):
        top, left = half * (k // 2), half * (k % 2)
        weight[k, :, top : top + half, left : left + half] = STEEPNESS / (3 * half * half)
    with torch.no_grad():
        hidden.weight.copy_(torch.cat([weight.flatten(1), -weight.flatten(1)]))
        hidden.bias.copy_(torch.tensor(4 * [-STEEPNESS / 2] + 4 * [STEEPNESS / 2]))
        out.weight.copy_(torch.cat([torch.eye(4), -torch.eye(4)], dim=1))
        out.bias.zero_()
    return Network(nn.Sequential(nn.Flatten(), hidden, nn.ReLU(), out), (0.0,) * 3, (1.0,) * 3).eval()


def images_with_contrast(contrast: float) -> tuple[Tensor, Tensor]:
    """Pixels 0 or 1, but for a quarter of grey ones; quadrant means differ from 1/2 by about `contrast`."""
    generator, labels = torch.Generator().manual_seed(0), torch.arange(COUNT) % 4
    images = torch.full((COUNT, 3, SIDE, SIDE), 0.5)
    images[:, :, ::2, ::2], images[:, :, 1::2, 1::2] = 0.0, 1.0
    half = SIDE // 2
    for image, k in zip(images, labels.tolist(), strict=True):
        image[:, ::2, 1::2] -= 4 * contrast
        quadrant = image[:, half * (k // 2) :, half * (k % 2) :][:, :half, :half]
        quadrant[:, ::2, 1::2] += 8 * contrast
    noise = 0.02 * torch.rand(images.shape, generator=generator)
    return (images + noise).clamp(0.0, 1.0), labels


def attack(network: Network, folder: Path, *calibration: Tensor) -> dict[str, np.ndarray]:
    """Verdicts of the int8 file that `calibration` images make."""
    write_onnx(network, SIDE, folder / "model.onnx", {})
    write_int8(folder / "model.onnx", [images.numpy() for images in calibration], folder / "int8.onnx")
    threat_model = ThreatModel(norm="linf", eps=EPS)
    measure = FileAttack(AttackedFile(folder / "int8.onnx"), "0" * 64, "reduced", threat_model, 4, seed=0)
    x, y = images_with_contrast(CONTRAST)
    ids = np.arange(COUNT)
    columns = measure.verdicts(network, x, y, ids)
    return {"sample_id": ids, **{name: column.numpy() for name, column in columns.items()}}


def result_of(verdicts: dict[str, Any]) -> FileAttackResult:
    values = {"attack": "file", "title": "", "settings": {"file_sha256": "0" * 64}, "chunk": 50, "model_sha256": "1"}
    header = EvaluationHeader.parse(values | {"data_sha256": "2", "images": len(verdicts["sample_id"])})
    return attack_result(header, verdicts)


def test_a_file_that_masks_its_gradient_is_not_stamped(tmp_path: Path) -> None:
    """Ranges from images without contrast cut off every hidden unit: no gradient is left, but all the vulnerability."""
    verdicts = attack(steep_network(), tmp_path, images_with_contrast(LITTLE)[0])
    result = result_of(verdicts)
    assert result.clean_correct == COUNT
    broken = result.broken_by or {}
    assert sum(broken[name] for name in GRADIENT) < COUNT / 4, "the file looks robust along its gradient"
    assert sum(broken[name] for name in BLACK_BOX) > COUNT / 2
    (doubt,) = result.doubts
    assert "masks its gradient" in doubt


def test_the_same_network_with_fitting_ranges_is_stamped(tmp_path: Path) -> None:
    verdicts = attack(steep_network(), tmp_path, images_with_contrast(2 * CONTRAST)[0])
    result = result_of(verdicts)
    assert (result.clean_correct, result.robust_correct, result.network_robust_correct) == (COUNT, 0, 0)
    assert result.broken_by is not None
    assert result.broken_by["gradient"] == COUNT
    assert result.doubts == ()


def test_the_standard_strength_is_autoattacks(tmp_path: Path) -> None:
    write_onnx(steep_network(), SIDE, tmp_path / "model.onnx", {})
    file, threat_model = AttackedFile(tmp_path / "model.onnx"), ThreatModel(norm="linf", eps=EPS)
    settings = FileAttack(file, "0" * 64, "standard", threat_model, 10, seed=0).settings
    expected = Ensemble("autoattack", threat_model, 10, seed=0).settings
    assert settings["network_attacks"] == expected["attacks"] == ["apgd-ce", "apgd-t", "fab-t", "square"]
    for name in ("iterations", "targets", "queries", "norm", "eps"):
        assert settings[name] == expected[name]


def verdicts_of(**columns: list[bool] | np.ndarray) -> dict[str, np.ndarray]:
    """Of images that are right unless `columns` say otherwise."""
    total = len(next(iter(columns.values())))
    right = ("clean_correct", "robust_correct", "network_clean_correct", "network_robust_correct", "transfer_correct")
    verdicts: dict[str, np.ndarray] = {name: np.ones(total, bool) for name in right}
    verdicts |= {f"broken_{name}": np.zeros(total, bool) for name in (*GRADIENT, *BLACK_BOX)}
    verdicts |= {"sample_id": np.arange(total), "twin_gap": np.zeros(total, np.float32)}
    return verdicts | {name: np.asarray(column) for name, column in columns.items()}


@pytest.mark.parametrize(("gap", "is_stamped"), [(0.01, True), (0.2, False), (np.nan, False)])
def test_a_twin_that_answers_otherwise_is_no_stamp(gap: float, is_stamped: bool) -> None:
    gaps = np.where(np.arange(100) < 10, np.float32(gap), np.float32(0))
    doubts = result_of(verdicts_of(twin_gap=gaps)).doubts
    assert (doubts == ()) == is_stamped
    if doubts:
        assert "10 of 100 images" in doubts[0]


def test_file_and_network_are_compared_image_by_image() -> None:
    """McNemar's test by its definition: 8 discordant images, 7 of them the network's alone."""
    file = np.array(20 * [True] + [True] + 7 * [False])
    network = np.array(20 * [True] + [False] + 7 * [True])
    result = result_of(verdicts_of(robust_correct=file, network_robust_correct=network))
    test = result.robust_comparison
    assert (test.only_file, test.only_network) == (1, 7)
    assert test.p_value == pytest.approx(2 * (1 + 8) / 2**8)
    assert test.difference == pytest.approx(-6 / 28)
    assert test.low < -6 / 28 < test.high
    assert result.clean_comparison.p_value == 1
