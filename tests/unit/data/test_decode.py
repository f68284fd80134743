"""Image files of every format decode to torchvision's RGB pixels; broken ones are refused."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline.data.sources.decode import BrokenImage, decode_rgb, fit_longer_side, fitted_size, jpeg_fault


def pixels(channels: int, seed: int = 0) -> np.ndarray:
    shape = (20, 30, channels) if channels > 1 else (20, 30)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def encoded(image: Image.Image, format: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("mode", "channels", "format", "kind"),
    [
        ("RGB", 3, "JPEG", "rgb"),
        ("RGB", 3, "PNG", "rgb"),
        ("RGB", 3, "WEBP", "rgb"),
        ("RGB", 3, "BMP", "rgb"),
        ("RGB", 3, "PPM", "rgb"),
        ("L", 1, "JPEG", "grey"),
        ("L", 1, "PNG", "grey"),
        ("CMYK", 4, "JPEG", "cmyk"),
        ("CMYK", 4, "TIFF", "cmyk"),
        ("RGBA", 4, "PNG", "alpha"),
        ("LA", 2, "PNG", "alpha"),
        ("YCbCr", 3, "TIFF", "other"),
    ],
)
def test_pixels_are_those_of_torchvision(mode: str, channels: int, format: str, kind: str) -> None:
    data = encoded(Image.frombytes(mode, (30, 20), pixels(channels).tobytes()), format)
    rgb, rgb_kind = decode_rgb(data)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    assert rgb_kind == kind
    assert rgb.dtype == np.uint8
    np.testing.assert_array_equal(rgb, expected)


def test_grey_is_replicated_bit_exactly() -> None:
    grey = pixels(1)
    rgb, _ = decode_rgb(encoded(Image.fromarray(grey), "PNG"))
    np.testing.assert_array_equal(rgb, np.stack([grey] * 3, axis=2))


def test_palette_with_transparency_loses_only_its_alpha() -> None:
    image = Image.fromarray(pixels(3)).quantize(16)
    rgb, kind = decode_rgb(encoded(image, "PNG", transparency=3))
    assert kind == "palette"
    np.testing.assert_array_equal(rgb, np.asarray(image.convert("RGB")))


def test_sixteen_bit_grey_keeps_its_upper_half() -> None:
    values = np.random.default_rng(0).integers(0, 65536, (20, 30)).astype(np.uint16)
    rgb, kind = decode_rgb(encoded(Image.fromarray(values), "PNG"))
    assert kind == "16-bit"
    np.testing.assert_array_equal(rgb[:, :, 1], (values >> 8).astype(np.uint8))


def test_exif_orientation_is_ignored() -> None:
    image = Image.fromarray(pixels(3))
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode_rgb(encoded(image, "JPEG", exif=exif))[0].shape == (20, 30, 3)


@pytest.mark.parametrize("data", [b"", b"404 not rgb", bytes(5000)])
def test_data_that_is_not_an_image_is_broken(data: bytes) -> None:
    with pytest.raises(BrokenImage, match="not an image"):
        decode_rgb(data)


def test_float_pixels_have_no_white_level() -> None:
    with pytest.raises(BrokenImage, match="white level"):
        decode_rgb(encoded(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"))


@given(st.integers(0, 2**32), st.sampled_from(["JPEG", "PNG"]))
@settings(deadline=None, max_examples=50)
def test_a_truncated_file_is_broken(length: int, format: str) -> None:
    data = encoded(Image.fromarray(pixels(3)), format)
    # The last bytes are an end marker, which decoders do not always require.
    with pytest.raises(BrokenImage):
        decode_rgb(data[: length % (len(data) - 40)])


def test_stored_jpeg_is_checked_strictly() -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8))
    good = np.frombuffer(encoded(image, "JPEG"), np.uint8)
    assert jpeg_fault(good, 40, 50) is None
    assert "40 x 50" in str(jpeg_fault(good, 50, 40))
    for damaged in (good[: len(good) // 2], np.zeros(1000, np.uint8), good[:0]):
        assert jpeg_fault(np.ascontiguousarray(damaged), 40, 50)


def test_random_bytes_inside_a_stored_jpeg_are_detected_though_pillow_accepts_them() -> None:
    rng = np.random.default_rng(0)
    smooth = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((160, 120))
    data = np.frombuffer(encoded(smooth, "JPEG"), np.uint8).copy()
    middle = len(data) * 2 // 3
    data[middle : middle + 100] = rng.integers(0, 255, 100, dtype=np.uint8)
    assert decode_rgb(data.tobytes())[0].shape == (120, 160, 3)
    assert jpeg_fault(data, 120, 160)


@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(1, 1600))
@settings(deadline=None)
def test_fitted_size(height: int, width: int, limit: int) -> None:
    h, w = fitted_size(height, width, limit)
    assert 1 <= h <= height
    assert 1 <= w <= width
    if max(height, width) <= limit:
        assert (h, w) == (height, width)
    else:
        assert max(h, w) == limit
        exact = height * limit / max(height, width), width * limit / max(height, width)
        assert abs(h - exact[0]) < 1
        assert abs(w - exact[1]) < 1


def test_fit_longer_side_keeps_flat_colour_and_extreme_shapes() -> None:
    flat = np.full((7, 2000, 3), (10, 200, 90), np.uint8)
    small = fit_longer_side(flat, 100)
    assert small.shape == (1, 100, 3)
    assert (small == (10, 200, 90)).all()
    assert fit_longer_side(flat, 2000) is flat
