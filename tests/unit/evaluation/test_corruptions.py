"""Corruptions against references: SciPy, OpenCV, colorsys and Pillow, and pixel-by-pixel implementations of their
definitions."""

from __future__ import annotations

import colorsys
import io
import math
from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
import pytest
import scipy.ndimage
import scipy.stats
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from pipeline.evaluation.corruptions.blurs import disk_kernel
from pipeline.evaluation.corruptions.measure import CORRUPTIONS, EXTRA, SEVERITIES, Corrupted, corrupted
from pipeline.evaluation.corruptions.resampling import split_keys, zoom_centre
from pipeline.evaluation.corruptions.weather import spatter
from pipeline.evaluation.measures.base import summarise
from pipeline.robustness.noise import device_keys, gaussian_noise, uniform_noise
from tests.support.synthetic_data import draw, trained_network

LEVELS, SEED = 255, 7
RISING = set(CORRUPTIONS) - {"glass_blur", "fog", "elastic_transform", "pixelate", "spatter", "saturate"}
"""Of which a larger severity changes images more. The published constants of the others do not say so: saturation first
falls and then rises, mud follows water, elastic deformations of severity 3 move pixels less far than those of 2, and
large pixels may fit an image's own edges better than smaller ones."""
Images = NDArray[np.float64]
Distribution = Callable[[float, float], Callable[[float], float]]
"""(level, constant) -> distribution function of the values."""


def photos(side: int, count: int = 6) -> Tensor:
    """8-bit images of smooth colours, one of them all black."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, 3, 4, 4, generator=generator)
    x = torch.nn.functional.interpolate(coarse, size=(side, side), mode="bilinear")
    x[-1] = 0
    return (x * LEVELS).round() / LEVELS


def corrupt(x: Tensor, name: str, severity: int) -> Tensor:
    return corrupted(x, np.arange(len(x)), SEED, name, severity)


def keys_of(x: Tensor, name: str, severity: int) -> Tensor:
    return device_keys(np.arange(len(x)), x.device, SEED, "corrupt", name, severity)


def constant(name: str, severity: int, side: int) -> Any:
    _, small, large = CORRUPTIONS[name]
    return (small if side <= 64 else large)[severity - 1]


def truncate(x: np.ndarray) -> np.ndarray:
    """Levels of float64 images, truncated as by np.uint8, with float32's tolerance."""
    return np.floor(np.clip(x, 0, 1) * LEVELS + 1e-3)


def as_image(x: Tensor) -> Image.Image:
    return Image.fromarray((x * LEVELS).round().to(torch.uint8).permute(1, 2, 0).numpy())


@pytest.mark.parametrize("side", [28, 80])
@pytest.mark.parametrize("name", CORRUPTIONS)
def test_images_stay_images_and_do_not_depend_on_their_batch(name: str, side: int) -> None:
    x, ids = photos(side), np.arange(6)
    for severity in (1, 5):
        result = corrupt(x, name, severity)
        assert (result.shape, result.dtype) == (x.shape, torch.float32)
        assert 0 <= result.min() <= result.max() <= 1
        torch.testing.assert_close(result * LEVELS, (result * LEVELS).round(), rtol=0, atol=1e-3)
        assert not torch.equal(result, x)
        assert torch.equal(result, corrupt(x, name, severity))
        for size in (1, 4):
            parts = [
                corrupted(part, ids[i * size : (i + 1) * size], SEED, name, severity)
                for i, part in enumerate(x.split(size))
            ]
            assert torch.equal(torch.cat(parts), result)


@pytest.mark.parametrize("side", [28, 80])
@pytest.mark.parametrize("name", sorted(RISING))
def test_a_larger_severity_changes_images_more(name: str, side: int) -> None:
    """On images with grain, so that blurs change them."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(16, 3, 7, 7, generator=generator)
    x = torch.nn.functional.interpolate(coarse, size=(side, side), mode="bilinear")
    x = 0.2 + 0.5 * x + 0.1 * torch.rand(x.shape, generator=generator)
    x = (x * LEVELS).round() / LEVELS
    change = [float((corrupt(x, name, severity) - x).square().mean()) for severity in SEVERITIES]
    assert change == sorted(change)
    assert change[0] < change[4]


@pytest.mark.parametrize("name", sorted(set(CORRUPTIONS) - {"zoom_blur", "defocus_blur", "gaussian_blur"}))
def test_noise_is_keyed_by_sample_and_seed(name: str) -> None:
    drawn = {"brightness", "contrast", "pixelate", "jpeg_compression", "saturate"}.isdisjoint({name})
    x = photos(28)[:1].expand(2, -1, -1, -1).contiguous()
    first, second = corrupt(x, name, 5)
    (other,) = corrupted(x[:1], np.array([0]), SEED + 1, name, 5)
    assert torch.equal(first, second) == torch.equal(first, other) == (not drawn)


@pytest.mark.parametrize(
    ("name", "distribution"),
    [
        ("gaussian_noise", lambda level, c: scipy.stats.norm(level, c).cdf),
        ("speckle_noise", lambda level, c: scipy.stats.norm(level, level * c).cdf),
        ("shot_noise", lambda level, c: lambda value: scipy.stats.poisson(level * c).cdf(np.floor(value * c + 1e-6))),
    ],
)
@pytest.mark.parametrize(("severity", "side"), [(1, 28), (5, 28), (5, 80)])
def test_noise_has_its_distribution(name: str, distribution: Distribution, severity: int, side: int) -> None:
    """The fraction of every level; values beyond 0 and 1 count for the outermost ones."""
    level, c = 102 / LEVELS, constant(name, severity, side)
    x = torch.full((20, 3, side, side), level)
    levels = (corrupt(x, name, severity) * LEVELS).round().long().flatten()
    result = np.bincount(levels.numpy(), minlength=256) / levels.numel()
    cdf = distribution(level, c)
    below = np.array([cdf((k + 1 - 1e-3) / LEVELS - 1e-9) for k in range(255)])
    expected = np.diff(np.concatenate([[0.0], below, [1.0]]))
    assert np.abs(np.cumsum(result) - np.cumsum(expected)).max() < 1.95 / levels.numel() ** 0.5  # Kolmogorov, 0.1 %


@pytest.mark.parametrize("severity", SEVERITIES)
def test_impulses_are_rare_and_as_often_black_as_white(severity: int) -> None:
    x = torch.full((20, 3, 28, 28), 102 / LEVELS)
    result, share = corrupt(x, "impulse_noise", severity), constant("impulse_noise", severity, 28)
    for value in (0.0, 1.0):
        hits = int((result == value).sum())
        assert scipy.stats.binomtest(hits, x.numel(), share / 2).pvalue > 1e-3
    assert torch.equal(result[(result != 0) & (result != 1)].unique(), x.unique())


@pytest.mark.parametrize(("severity", "side"), [(1, 28), (5, 28), (3, 80)])
def test_the_blur_is_scipys(severity: int, side: int) -> None:
    x = photos(side)
    sigma = constant("gaussian_blur", severity, side)
    expected = scipy.ndimage.gaussian_filter(x.double().numpy(), (0, 0, sigma, sigma), mode="nearest", truncate=4.0)
    difference = (corrupt(x, "gaussian_blur", severity) * LEVELS).round().numpy() - truncate(expected)
    assert np.abs(difference).max() <= 1
    assert (difference != 0).mean() < 0.01


@pytest.mark.parametrize("severity", [1, 5])
def test_brightness_and_contrast(severity: int) -> None:
    x = photos(8)
    result = (corrupt(x, "brightness", severity) * LEVELS).round().permute(0, 2, 3, 1).reshape(-1, 3).numpy()
    more = constant("brightness", severity, 8)
    expected = []
    for pixel in x.double().permute(0, 2, 3, 1).reshape(-1, 3).tolist():
        hue, saturation, value = colorsys.rgb_to_hsv(*pixel)
        expected.append(colorsys.hsv_to_rgb(hue, saturation, min(value + more, 1.0)))
    assert np.abs(result - truncate(np.array(expected))).max() <= 1
    share, pixels = constant("contrast", severity, 8), x.double().numpy()
    means = pixels.mean(axis=(2, 3), keepdims=True)
    result = (corrupt(x, "contrast", severity) * LEVELS).round().numpy()
    assert np.abs(result - truncate((pixels - means) * share + means)).max() <= 1


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


def filtered(x: Images, deviation: float) -> Images:
    result = scipy.ndimage.gaussian_filter(x, (0, 0, deviation, deviation), mode="nearest", truncate=4.0)
    return np.asarray(result, np.float64)


def close(result: Tensor, expected: Images, *, most: float = 0.01) -> None:
    """Levels are equal up to rounding of few values."""
    difference = (result * LEVELS).round().numpy() - truncate(expected)
    assert np.abs(difference).max() <= 1
    assert (difference != 0).mean() < most


@pytest.mark.parametrize("severity", SEVERITIES)
@pytest.mark.parametrize("side", [28, 80])
def test_defocus_is_a_soft_disk(severity: int, side: int) -> None:
    """Kernel by OpenCV, convolution by SciPy."""
    x = photos(side)
    radius, soft = constant("defocus_blur", severity, side)
    reach, size = (8, 3) if radius <= 8 else (radius, 5)
    rows, columns = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    disk = (rows**2 + columns**2 <= radius**2).astype(np.float64)
    kernel = cv2.GaussianBlur(disk / disk.sum(), (size, size), soft)
    assert np.allclose(disk_kernel(radius, soft).numpy(), kernel, rtol=0, atol=1e-9)
    expected = scipy.ndimage.correlate(x.double().numpy(), kernel[None, None], mode="mirror")
    close(corrupt(x, "defocus_blur", severity), expected)


@pytest.mark.parametrize(("severity", "side"), [(1, 28), (5, 28), (3, 80), (5, 80)])
def test_glass_copies_pixels_one_by_one(severity: int, side: int) -> None:
    x, name = photos(side), "glass_blur"
    deviation, reach, times = constant(name, severity, side)
    inner = side - 2 * reach
    draws = uniform_noise(keys_of(x, name, severity), (times, inner, inner, 2)).double().numpy()
    offsets = np.floor(draws * 2 * reach).astype(int) - reach
    assert set(offsets.flatten().tolist()) == set(range(-reach, reach))
    pixels = truncate(filtered(x.double().numpy(), deviation)) / LEVELS
    for image, moves in zip(pixels, offsets, strict=True):
        for time in range(times):
            for row in range(side - reach, reach, -1):
                for column in range(side - reach, reach, -1):
                    down, right = moves[time, row - reach - 1, column - reach - 1]
                    image[:, row, column] = image[:, row + down, column + right]
    close(corrupt(x, name, severity), filtered(pixels, deviation))


def in_motion(image: Images, radius: int, deviation: float, angle: float) -> Images:
    """[h, w], pixel by pixel, rounded to 8 bits."""
    weights = [math.exp(-(i**2) / (2 * deviation**2)) for i in range(2 * radius + 1)]
    height, width = image.shape
    result = np.zeros_like(image)
    for row in range(height):
        for column in range(width):
            for i, weight in enumerate(weights):
                right = math.ceil(i * math.cos(math.radians(angle)) - 0.5)
                down = math.ceil(i * math.sin(math.radians(angle)) - 0.5)
                there = (min(max(row + down, 0), height - 1), min(max(column + right, 0), width - 1))
                result[row, column] += weight / sum(weights) * image[there]
    return np.round(result * LEVELS) / LEVELS


@pytest.mark.parametrize(("severity", "side"), [(1, 28), (5, 28)])
def test_motion_blur_is_one_sided(severity: int, side: int) -> None:
    x, name = photos(side), "motion_blur"
    radius, deviation = constant(name, severity, side)
    angles = -45 + 90 * uniform_noise(keys_of(x, name, severity), (1,)).double().numpy()[:, 0]
    assert np.ptp(angles) > 10
    expected = [
        [in_motion(channel, radius, deviation, angle) for channel in image]
        for image, angle in zip(x.double().numpy(), angles, strict=True)
    ]
    close(corrupt(x, name, severity), np.array(expected))


def enlarged(x: Images, factor: float) -> Images:
    """The enlarged centre of [..., h, h]."""
    side = x.shape[-1]
    part = math.ceil(side / factor)
    first = (side - part) // 2
    middle = x[..., first : first + part, first : first + part]
    large = scipy.ndimage.zoom(middle, [1] * (x.ndim - 2) + [factor, factor], order=1, mode="nearest")
    trim = (large.shape[-1] - side) // 2
    return np.asarray(large, np.float64)[..., trim : trim + side, trim : trim + side]


@pytest.mark.parametrize(("severity", "side"), [(1, 28), (5, 28), (3, 80), (5, 80)])
def test_zoom_is_scipys(severity: int, side: int) -> None:
    x = photos(side)
    pixels, factors = x.double().numpy(), constant("zoom_blur", severity, side)
    assert (factors[0], factors[-1]) == (1, pytest.approx(1.1 if side == 28 else 1.15, abs=0.16))
    expected = np.mean([pixels, *(enlarged(pixels, factor) for factor in factors)], axis=0)
    close(corrupt(x, "zoom_blur", severity), expected)


def test_an_enlarged_image_is_trimmed_on_both_sides() -> None:
    x = torch.rand(1, 1, 73, 73, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert np.allclose(zoom_centre(x, 4).numpy(), enlarged(x.numpy(), 4), rtol=0, atol=1e-12)


def test_snow_falls_both_ways_over_a_paler_image() -> None:
    x, name, side = photos(28), "snow", 28
    for severity in (1, 5):
        mean, deviation, factor, least, radius, spread, share = constant(name, severity, side)
        flakes, wind = split_keys(keys_of(x, name, severity), 2)
        layers = enlarged(mean + deviation * gaussian_noise(flakes, (side, side)).double().numpy(), factor)
        layers = truncate(np.where(layers < least, 0, layers)) / LEVELS
        angles = -135 + 90 * uniform_noise(wind, (1,)).double().numpy()[:, 0]
        layers = np.array([in_motion(layer, radius, spread, a) for layer, a in zip(layers, angles, strict=True)])
        pixels = x.double().numpy()
        grey = 0.299 * pixels[:, :1] + 0.587 * pixels[:, 1:2] + 0.114 * pixels[:, 2:]
        pale = share * pixels + (1 - share) * np.maximum(pixels, 1.5 * grey + 0.5)
        close(corrupt(x, name, severity), pale + (layers + np.rot90(layers, 2, axes=(1, 2)))[:, None])


def clouds(numbers: list[float], side: int, decay: float) -> Images:
    """Diamond-square on a torus, point by point."""
    field, draws = np.zeros((side, side)), iter(numbers)
    step, wobble = side, 100.0
    while step >= 2:
        half = step // 2
        straight, slanted = (
            [(-half, 0), (half, 0), (0, -half), (0, half)],
            [(i, j) for i in (-half, half) for j in (-half, half)],
        )
        for first_row, first_column, corners in ((half, half, slanted), (0, half, straight), (half, 0, straight)):
            for row in range(first_row, side, step):
                for column in range(first_column, side, step):
                    around = [field[(row + down) % side, (column + right) % side] for down, right in corners]
                    field[row, column] = sum(around) / 4 + wobble * wobble * (2 * next(draws) - 1)
        step, wobble = half, wobble / decay
    assert next(draws, None) is None
    return (field - field.min()) / (field.max() - field.min())


@pytest.mark.parametrize(("severity", "side", "covered"), [(1, 28, 32), (5, 32, 32), (4, 80, 128)])
def test_fog_is_a_plasma_fractal(severity: int, side: int, covered: int) -> None:
    x, name = photos(side)[:2], "fog"
    amount, decay = constant(name, severity, side)
    draws = uniform_noise(keys_of(x, name, severity), (covered**2 - 1,)).double().tolist()
    plasma = np.array([clouds(numbers, covered, decay)[:side, :side] for numbers in draws])
    pixels = x.double().numpy()
    brightest = pixels.max(axis=(1, 2, 3), keepdims=True)
    close(corrupt(x, name, severity), (pixels + amount * plasma[:, None]) * brightest / (brightest + amount))


@pytest.mark.parametrize(("severity", "side"), [(1, 28), (2, 28), (5, 28), (1, 80), (2, 80), (5, 80)])
def test_elastic_is_opencvs_map_and_scipys_noise(severity: int, side: int) -> None:
    x, name = photos(side), "elastic_transform"
    amount, deviation, most = constant(name, severity, side)
    points, downwards, sideways = split_keys(keys_of(x, name, severity), 3)
    middle, square = side // 2, side // 3
    before = middle + square * np.array([[1, 1], [1, -1], [-1, -1]], np.float32)
    rows, columns = np.mgrid[:side, :side].astype(np.float64)
    for i, image in enumerate(x.double().numpy()):
        after = before + most * (2 * uniform_noise(points[i : i + 1], (3, 2))[0].numpy() - 1)
        back = cv2.getAffineTransform(after.astype(np.float32), before)
        across, down = (line[0] * columns + line[1] * rows + line[2] for line in back)
        moved = np.array([scipy.ndimage.map_coordinates(c, [down, across], order=1, mode="mirror") for c in image])
        if amount:
            noise = [
                2 * uniform_noise(k[i : i + 1], (side, side))[0].double().numpy() - 1 for k in (downwards, sideways)
            ]
            down, right = (
                amount * scipy.ndimage.gaussian_filter(one, deviation, mode="reflect", truncate=3.0) for one in noise
            )
            there = [rows + down, columns + right]
            moved = np.array([scipy.ndimage.map_coordinates(c, there, order=1, mode="reflect") for c in moved])
        close(corrupt(x, name, severity)[i], moved)


@pytest.mark.parametrize("severity", SEVERITIES)
def test_saturation_is_colorsys(severity: int) -> None:
    x = photos(8)
    x[0] = x[0, :1]  # greys
    times, more = constant("saturate", severity, 8)
    expected = []
    for pixel in x.double().permute(0, 2, 3, 1).reshape(-1, 3).tolist():
        hue, saturation, value = colorsys.rgb_to_hsv(*pixel)
        expected.append(colorsys.hsv_to_rgb(hue, min(saturation * times + more, 1.0), value))
    result = (corrupt(x, "saturate", severity) * LEVELS).round().permute(0, 2, 3, 1).reshape(-1, 3).numpy()
    assert np.abs(result - truncate(np.array(expected))).max() <= 1


def liquid_on(x: Tensor, severity: int) -> Images:
    mean, deviation, spread, least, *_ = constant("spatter", severity, x.shape[-1])
    noise = gaussian_noise(keys_of(x, "spatter", severity), x.shape[2:]).double().numpy()
    liquid = filtered((mean + deviation * noise)[:, None], spread)
    return np.where(liquid < least, 0, liquid)


@pytest.mark.parametrize(("severity", "side"), [(4, 28), (5, 28), (4, 80)])
def test_mud_covers(severity: int, side: int) -> None:
    x = photos(side)
    *_, least, spread, _ = constant("spatter", severity, side)
    cover = filtered((liquid_on(x, severity) > least).astype(np.float64), spread)
    cover = np.where(cover < 0.8, 0, cover)
    assert 0 < cover.mean() < 0.5
    mud = np.array([63, 42, 20])[:, None, None] / LEVELS
    close(corrupt(x, "spatter", severity), x.double().numpy() * (1 - cover) + mud * cover)


@pytest.mark.parametrize(("severity", "side"), [(1, 28), (3, 28), (1, 80), (3, 80)])
def test_water_shines_where_there_are_drops(severity: int, side: int) -> None:
    x = torch.zeros(6, 3, side, side)
    result, dry = corrupt(x, "spatter", severity), torch.from_numpy(liquid_on(x, severity) == 0)
    assert 0 < dry.double().mean() < 1
    assert (result[dry.expand_as(result)] == 0).all()
    brightest = (result * LEVELS).round().amax(dim=(2, 3))
    amount = constant("spatter", severity, side)[4]
    wet = (~dry).any(dim=(1, 2, 3))
    assert torch.equal(
        brightest[wet], torch.tensor([175.0, 238, 238]).mul(amount + 1e-6).floor().expand(int(wet.sum()), 3)
    )
    assert torch.equal(result[:, 1], result[:, 2])


def test_an_image_without_drops_is_unchanged() -> None:
    x = photos(28)
    assert torch.equal(spatter(x, keys_of(x, "spatter", 1), (0.0, 0.0, 1.0, 0.5, 0.5, 0)), x)


def test_robust_is_correct_under_all_corruptions() -> None:
    grey, y = draw(64, seed=5)
    x, network = grey.expand(-1, 3, -1, -1), trained_network()
    first = torch.nn.Sequential(torch.nn.Conv2d(3, 1, 1, bias=False), network)
    torch.nn.init.constant_(next(first.parameters()), 1 / 3)
    ids = np.arange(64)
    verdicts = Corrupted(10, seed=7).verdicts(first, x, y, ids)
    with torch.no_grad():
        right = [first(corrupted(x, ids, 7, name, s)).argmax(1) == y for name in CORRUPTIONS for s in SEVERITIES]
    expected = torch.stack([*right, first(x).argmax(1) == y]).all(dim=0)
    assert torch.equal(verdicts["robust_correct"], expected)
    assert 0 < expected.sum() < verdicts["clean_correct"].sum()
    columns = {"sample_id": ids, **{name: column.numpy() for name, column in verdicts.items()}}
    summary = summarise(columns)
    assert list(summary["corruption_accuracy"]) == list(CORRUPTIONS)
    assert summary["corruption_accuracy"]["pixelate"][4] == float(verdicts["right_pixelate_5"].float().mean())
    assert summary["corruption_accuracy"]["spatter"][0] == float(verdicts["extra_spatter_1"].float().mean())
    counted = torch.stack(right).float().mean(dim=1).view(len(CORRUPTIONS), len(SEVERITIES))
    counted = counted[[name not in EXTRA for name in CORRUPTIONS]]
    assert summary["severity_accuracy"] == pytest.approx(counted.mean(dim=0).tolist())
    assert summary["mean_corruption_accuracy"] == pytest.approx(float(counted.mean()))
