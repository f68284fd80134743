"""Image files of every format decode to torchvision's RGB pixels; broken ones are refused."""

from __future__ import annotations

import io
import resource
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline.data.sources.decode import BrokenImage, Rendering, decode_rgb, fit_longer_side, fitted_size, jpeg_fault


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
        ("RGB", 3, "JPEG", None),
        ("RGB", 3, "PNG", None),
        ("RGB", 3, "WEBP", None),
        ("RGB", 3, "BMP", None),
        ("RGB", 3, "PPM", None),
        ("L", 1, "JPEG", "grey"),
        ("L", 1, "PNG", "grey"),
        ("CMYK", 4, "JPEG", "cmyk"),
        ("CMYK", 4, "TIFF", "cmyk"),
        ("RGBA", 4, "PNG", "alpha"),
        ("LA", 2, "PNG", "alpha"),
        ("YCbCr", 3, "TIFF", "other"),
    ],
)
def test_pixels_are_those_of_torchvision(mode: str, channels: int, format: str, kind: str | None) -> None:
    data = encoded(Image.frombytes(mode, (30, 20), pixels(channels).tobytes()), format)
    rgb, kinds = decode_rgb(data)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    assert kinds == (() if kind is None else (kind,))
    assert rgb.dtype == np.uint8
    np.testing.assert_array_equal(rgb, expected)


def test_grey_is_replicated_bit_exactly() -> None:
    grey = pixels(1)
    rgb, _ = decode_rgb(encoded(Image.fromarray(grey), "PNG"))
    np.testing.assert_array_equal(rgb, np.stack([grey] * 3, axis=2))


def test_palette_with_transparency_loses_only_its_alpha() -> None:
    image = Image.fromarray(pixels(3)).quantize(16)
    rgb, kinds = decode_rgb(encoded(image, "PNG", transparency=3))
    assert kinds == ("palette",)
    np.testing.assert_array_equal(rgb, np.asarray(image.convert("RGB")))


def test_sixteen_bit_grey_keeps_its_upper_half() -> None:
    values = np.random.default_rng(0).integers(0, 65536, (20, 30)).astype(np.uint16)
    rgb, kinds = decode_rgb(encoded(Image.fromarray(values), "PNG"))
    assert kinds == ("16-bit",)
    np.testing.assert_array_equal(rgb[:, :, 1], (values >> 8).astype(np.uint8))


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_exif_orientation_is_counted_and_applied_where_it_is_asked_for(format: str) -> None:
    image = Image.fromarray(pixels(3))
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(image, format, exif=exif, **({"lossless": True} if format == "WEBP" else {}))
    stored, kinds = decode_rgb(data)
    assert (stored.shape, kinds) == ((20, 30, 3), ("EXIF rotation ignored",))
    turned, kinds = decode_rgb(data, Rendering(exif_rotate=True))
    assert kinds == ("EXIF rotation applied",)
    np.testing.assert_array_equal(turned, np.rot90(stored, -1))


@pytest.mark.parametrize("value", [0, 1, 9])
def test_an_upright_image_is_not_turned(value: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = value
    image = encoded(Image.fromarray(pixels(3)), "PNG", exif=exif)
    assert decode_rgb(image, Rendering(exif_rotate=True))[1] == ()


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_damaged_exif_does_not_break_an_image() -> None:
    whole = encoded(Image.fromarray(pixels(3)), "JPEG", exif=b"Exif\0\0MM\0*\0\0\xff\xff" + bytes(range(40)))
    assert decode_rgb(whole)[0].shape == (20, 30, 3)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB"])
def test_a_background_shows_through_transparent_pixels(mode: str) -> None:
    """Below alpha 0 is the background, at 255 the image, exactly; without a background the colour that is hidden."""
    rgba = np.dstack([pixels(3), np.full((20, 30), 255, np.uint8)])
    rgba[:10, :, 3] = 0
    options: dict[str, Any] = {}
    if mode == "LA":
        image = Image.fromarray(rgba, "RGBA").convert("LA")
    elif mode == "RGBA":
        image = Image.fromarray(rgba, "RGBA")
    else:
        rgba[:10, :, :3] = (255, 0, 255)
        rgba[10:, :, :3] //= 2
        plain = Image.fromarray(np.ascontiguousarray(rgba[:, :, :3]))
        image = plain if mode == "RGB" else plain.quantize(16)
        options = {"transparency": (255, 0, 255) if mode == "RGB" else int(np.asarray(image)[0, 0])}
    data = encoded(image, "PNG", **options)
    hidden, _ = decode_rgb(data)
    shown, kinds = decode_rgb(data, Rendering(background=(10, 200, 30)))
    assert kinds == ("alpha",)
    np.testing.assert_array_equal(shown[:10], np.broadcast_to((10, 200, 30), (10, 30, 3)))
    np.testing.assert_array_equal(shown[10:], hidden[10:])
    assert (hidden[:10] != shown[:10]).any()


def test_a_background_leaves_opaque_images_alone() -> None:
    for data in (encoded(Image.fromarray(pixels(3)), "JPEG"), encoded(Image.fromarray(pixels(1)), "PNG")):
        for plain, other in zip(decode_rgb(data), decode_rgb(data, Rendering(background=(1, 2, 3))), strict=True):
            np.testing.assert_array_equal(plain, other)


def test_the_first_frame_of_a_gif_is_read() -> None:
    frames = [Image.fromarray(pixels(3, seed)).quantize(32) for seed in range(3)]
    stream = io.BytesIO()
    frames[0].save(stream, "GIF", save_all=True, append_images=frames[1:])
    rgb, kinds = decode_rgb(stream.getvalue())
    np.testing.assert_array_equal(rgb, np.asarray(Image.open(stream).convert("RGB")))
    assert "first of several frames" in kinds
    assert decode_rgb(encoded(frames[0], "GIF"))[1] == ("palette",)


@pytest.mark.parametrize("rendering", [Rendering(), Rendering((255, 255, 255), exif_rotate=True)])
@pytest.mark.parametrize("format", ["JPEG", "PNG", "GIF"])
def test_an_image_that_claims_to_be_huge_is_refused_before_memory_is_taken(format: str, rendering: Rendering) -> None:
    data = bytearray(encoded(Image.fromarray(pixels(3)), format))
    if format == "JPEG":
        frame = data.index(b"\xff\xc0") + 5
        data[frame : frame + 4] = b"\xff\xff\xff\xff"
    elif format == "PNG":
        data[16:24] = b"\0\0\xff\xff" * 2
        data[29:33] = zlib.crc32(bytes(data[12:29])).to_bytes(4, "big")
    else:
        data[6:10] = b"\xff\xff\xff\xff"
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(BrokenImage, match="claims to be too large, so it was not decoded"):
        decode_rgb(bytes(data), rendering)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB


def test_formats_that_start_a_program_or_hide_their_size_are_not_tried() -> None:
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"
    for data in (eps, encoded(Image.fromarray(pixels(3)), "ICO")):
        with pytest.raises(BrokenImage, match="not an image of any known format"):
            decode_rgb(data)


@pytest.mark.parametrize("data", [b"", b"404 not rgb", bytes(5000)])
def test_data_that_is_not_an_image_is_broken(data: bytes) -> None:
    with pytest.raises(BrokenImage, match="not an image"):
        decode_rgb(data)


def test_float_pixels_have_no_white_level() -> None:
    with pytest.raises(BrokenImage, match="white level"):
        decode_rgb(encoded(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"))


@given(st.integers(0, 2**32), st.sampled_from(["JPEG", "PNG"]))
@settings(max_examples=50)
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
