"""Corruptions against what they are said to be: SciPy's distributions and filter, colorsys, Pillow."""

from __future__ import annotations

import colorsys
import io
from collections.abc import Callable

import numpy as np
import pytest
import scipy.stats
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter
from torch import Tensor

from pipeline.evaluate.corruptions import CORRUPTIONS, SEVERITIES, Corrupted, corrupted
from pipeline.evaluate.measure import summarise
from tests.stripes import draw, trained_network

LEVELS = 255
Distribution = Callable[[float, float], Callable[[float], float]]
"""(level, constant) -> distribution function of the values."""


def photos(side: int, count: int = 6) -> Tensor:
    """Smooth colours with 8 bits, one image all black."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, 3, 4, 4, generator=generator)
    x = torch.nn.functional.interpolate(coarse, size=(side, side), mode="bilinear")
    x[-1] = 0
    return (x * LEVELS).round() / LEVELS


def corrupt(x: Tensor, name: str, severity: int) -> Tensor:
    return corrupted(x, np.arange(len(x)), 7, name, severity)


def constant(name: str, severity: int, side: int) -> float:
    _, small, large = CORRUPTIONS[name]
    return (small if side <= 64 else large)[severity - 1]


def cut(x: np.ndarray) -> np.ndarray:
    """Levels of float64 images, as np.uint8 cuts them; the tolerance is float32's."""
    return np.floor(np.clip(x, 0, 1) * LEVELS + 1e-3)


def as_image(x: Tensor) -> Image.Image:
    return Image.fromarray((x * LEVELS).round().to(torch.uint8).permute(1, 2, 0).numpy())


@pytest.mark.parametrize("side", [28, 80])
@pytest.mark.parametrize("name", CORRUPTIONS)
def test_images_stay_images_and_do_not_depend_on_their_batch(name: str, side: int) -> None:
    x = photos(side)
    for severity in (1, 5):
        found = corrupt(x, name, severity)
        assert (found.shape, found.dtype) == (x.shape, torch.float32)
        assert 0 <= found.min() <= found.max() <= 1
        torch.testing.assert_close(found * LEVELS, (found * LEVELS).round(), rtol=0, atol=1e-3)
        alone = corrupted(x[2:3], np.array([2]), 7, name, severity)
        torch.testing.assert_close(alone[0], found[2], rtol=0, atol=1.01 / LEVELS)
        assert not torch.equal(found, x)
    error = [float((corrupt(x[:-1], name, severity) - x[:-1]).square().mean()) for severity in SEVERITIES]
    assert error[0] < error[4]


@pytest.mark.parametrize(
    ("name", "distribution"),
    [
        ("gaussian_noise", lambda level, c: scipy.stats.norm(level, c).cdf),
        ("shot_noise", lambda level, c: lambda value: scipy.stats.poisson(level * c).cdf(np.floor(value * c + 1e-6))),
    ],
)
@pytest.mark.parametrize(("severity", "side"), [(1, 28), (5, 28), (5, 80)])
def test_noise_has_its_distribution(name: str, distribution: Distribution, severity: int, side: int) -> None:
    """Every level's share, with what lies beyond 0 and 1 in the outermost ones."""
    level, c = 102 / LEVELS, constant(name, severity, side)
    x = torch.full((20, 3, side, side), level)
    levels = (corrupt(x, name, severity) * LEVELS).round().long().flatten()
    found = np.bincount(levels.numpy(), minlength=256) / levels.numel()
    cdf = distribution(level, c)
    below = np.array([cdf((k + 1 - 1e-3) / LEVELS - 1e-9) for k in range(255)])
    expected = np.diff(np.concatenate([[0.0], below, [1.0]]))
    assert np.abs(np.cumsum(found) - np.cumsum(expected)).max() < 1.95 / levels.numel() ** 0.5  # Kolmogorov, 0.1 %


@pytest.mark.parametrize("severity", SEVERITIES)
def test_impulses_are_rare_and_as_often_black_as_white(severity: int) -> None:
    x = torch.full((20, 3, 28, 28), 102 / LEVELS)
    found, share = corrupt(x, "impulse_noise", severity), constant("impulse_noise", severity, 28)
    for value in (0.0, 1.0):
        hits = int((found == value).sum())
        assert scipy.stats.binomtest(hits, x.numel(), share / 2).pvalue > 1e-3
    assert torch.equal(found[(found != 0) & (found != 1)].unique(), x.unique())


@pytest.mark.parametrize(("severity", "side"), [(1, 28), (5, 28), (3, 80)])
def test_the_blur_is_scipys(severity: int, side: int) -> None:
    x = photos(side)
    sigma = constant("gaussian_blur", severity, side)
    expected = gaussian_filter(x.double().numpy(), (0, 0, sigma, sigma), mode="nearest", truncate=4.0)
    difference = (corrupt(x, "gaussian_blur", severity) * LEVELS).round().numpy() - cut(expected)
    assert np.abs(difference).max() <= 1
    assert (difference != 0).mean() < 0.01


@pytest.mark.parametrize("severity", [1, 5])
def test_brightness_and_contrast(severity: int) -> None:
    x = photos(8)
    found = (corrupt(x, "brightness", severity) * LEVELS).round().permute(0, 2, 3, 1).reshape(-1, 3).numpy()
    more = constant("brightness", severity, 8)
    expected = []
    for pixel in x.double().permute(0, 2, 3, 1).reshape(-1, 3).tolist():
        hue, saturation, value = colorsys.rgb_to_hsv(*pixel)
        expected.append(colorsys.hsv_to_rgb(hue, saturation, min(value + more, 1.0)))
    assert np.abs(found - cut(np.array(expected))).max() <= 1
    share, pixels = constant("contrast", severity, 8), x.double().numpy()
    means = pixels.mean(axis=(2, 3), keepdims=True)
    found = (corrupt(x, "contrast", severity) * LEVELS).round().numpy()
    assert np.abs(found - cut((pixels - means) * share + means)).max() <= 1


@pytest.mark.parametrize(("severity", "side"), [(1, 28), (5, 28), (5, 80)])
def test_pixels_and_jpegs_are_pillows(severity: int, side: int) -> None:
    x = photos(side)
    share, quality = constant("pixelate", severity, side), constant("jpeg_compression", severity, side)
    blocks, jpegs = corrupt(x, "pixelate", severity), corrupt(x, "jpeg_compression", severity)
    for image, block, jpeg in zip(x, blocks, jpegs, strict=True):
        box, size = Image.Resampling.BOX, int(side * share)
        small = as_image(image).resize((size, size), box)
        assert np.array_equal(np.asarray(as_image(block)), np.asarray(small.resize((side, side), box)))
        stream = io.BytesIO()
        as_image(image).save(stream, "JPEG", quality=int(quality))
        assert np.array_equal(np.asarray(as_image(jpeg)), np.asarray(Image.open(stream)))


def test_robust_is_right_under_all() -> None:
    grey, y = draw(64, seed=5)
    x, network = grey.expand(-1, 3, -1, -1), trained_network()
    first = torch.nn.Sequential(torch.nn.Conv2d(3, 1, 1, bias=False), network)
    torch.nn.init.constant_(next(first.parameters()), 1 / 3)
    ids = np.arange(64)
    verdicts = Corrupted(10, seed=7).judge(first, x, y, ids)
    with torch.no_grad():
        right = [first(corrupted(x, ids, 7, name, s)).argmax(1) == y for name in CORRUPTIONS for s in SEVERITIES]
    expected = torch.stack([*right, first(x).argmax(1) == y]).all(dim=0)
    assert torch.equal(verdicts["robust_correct"], expected)
    assert 0 < expected.sum() < verdicts["clean_correct"].sum()
    columns = {"sample_id": ids, **{name: column.numpy() for name, column in verdicts.items()}}
    summary = summarise(columns)
    assert list(summary["corruption_accuracy"]) == list(CORRUPTIONS)
    assert summary["corruption_accuracy"]["pixelate"][4] == float(verdicts["right_pixelate_5"].float().mean())
    assert summary["mean_corruption_accuracy"] == pytest.approx(float(torch.stack(right).float().mean()))
