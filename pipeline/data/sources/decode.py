"""Decodes image files of any format to RGB pixels, and strictly checks stored JPEGs.

By default the pixels are those of `PIL.Image.open(file).convert("RGB")`, as in torchvision's ImageFolder, so a network
trained elsewhere sees the same images here. It follows that:

- A file's content determines its format, never its name (ImageNet has a PNG that is called .JPEG). The first of several
  frames is read.
- EXIF orientation is ignored, as in the ImageNet literature; rotating images would change known accuracies.
- Alpha is dropped, not composited: transparent pixels get the colour that is stored for them.
- Grey is replicated into three channels, bit-exact. CMYK goes through Pillow's conversion without a colour profile.
- One exception: 16-bit grey keeps its upper 8 bits, where Pillow would clip everything above 255 to white.
- A truncated JPEG is broken, although most viewers show its upper part.

`Rendering` says otherwise of alpha and orientation, for photographs that have no known accuracies.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import io
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageColor, ImageOps, UnidentifiedImageError

FORMATS = ("JPEG", "PNG", "BMP", "PPM", "TIFF", "WEBP", "GIF", "JPEG2000", "AVIF", "HEIF")
"""Formats that are read, where Pillow has them. Of the others, some hold images whose size Pillow does not check before
it allocates for them (ICO), and some start another program (EPS)."""

KINDS = {
    "RGB": None,
    "1": "grey",
    "L": "grey",
    "CMYK": "cmyk",
    "P": "palette",
    "RGBA": "alpha",
    "RGBa": "alpha",
    "LA": "alpha",
    "La": "alpha",
    "PA": "alpha",
    "RGBX": "other",
    "YCbCr": "other",
    "LAB": "other",
    "HSV": "other",
}
"""Pillow's modes that `convert("RGB")` maps without loss of range -> their kind in the manifest."""

ORIENTATION, UPRIGHT = 0x0112, 1
"""The EXIF tag, and its value for an image that is stored as it is to be seen."""

TURBOJPEG_RGB = 0


class BrokenImage(ValueError):
    """An image cannot be decoded; the message is the reason."""


@dataclass(frozen=True)
class Rendering:
    """How transparent and turned images become RGB."""

    background: tuple[int, int, int] | None = None
    """The colour behind transparent pixels; None gives each the colour that is stored for it."""
    exif_rotate: bool = False
    """Turn images as their EXIF orientation says."""


AS_STORED = Rendering()


def colour_text(colour: tuple[int, int, int] | None) -> str | None:
    """#rrggbb."""
    return None if colour is None else "#{:02x}{:02x}{:02x}".format(*colour)


def parse_colour(text: str) -> tuple[int, int, int]:
    """A colour by CSS's name or #rrggbb. Errors: ValueError."""
    red, green, blue, *alpha = ImageColor.getrgb(text)
    if alpha:
        raise ValueError(f"{text!r} is itself transparent")
    return red, green, blue


@functools.cache
def reads_heif() -> bool:
    """Whether HEIC files can be read: with the package pillow-heif."""
    try:
        importlib.import_module("pillow_heif").register_heif_opener()
    except ImportError:
        return False
    return True


@functools.cache
def _formats() -> tuple[str, ...]:
    reads_heif()
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def decode_rgb(data: bytes, rendering: Rendering = AS_STORED) -> tuple[NDArray[np.uint8], tuple[str, ...]]:
    """Decode a whole image file: bytes -> (pixels uint8 [height, width, 3], kinds).

    kinds is what was not plain RGB: 'grey', 'cmyk', 'palette', 'alpha', '16-bit' or 'other'; 'first of several frames';
    'EXIF rotation ignored' or 'EXIF rotation applied'. Errors: BrokenImage, also for an image that claims more than
    Pillow's limit of pixels, for which nothing is allocated.
    """
    try:
        with Image.open(io.BytesIO(data), formats=_formats()) as image:
            image.load()
            return _render(image, rendering)
    except (BrokenImage, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        raise BrokenImage(f"it claims to be too large, so it was not decoded: {error}") from None
    except UnidentifiedImageError:
        raise BrokenImage("not an image of any known format") from None
    except Exception as error:
        # Pillow's forty decoders raise many types for damaged files (SyntaxError and struct.error among them); any of
        # them means that this file cannot be decoded. io.BytesIO rules out disk errors.
        raise BrokenImage(f"{type(error).__name__}: {error}") from None


def _render(image: Image.Image, rendering: Rendering) -> tuple[NDArray[np.uint8], tuple[str, ...]]:
    kinds: list[str | None] = []
    if getattr(image, "is_animated", False) and image.format != "MPO":  # a photograph with its preview
        kinds.append("first of several frames")
    if _orientation(image) != UPRIGHT:
        kinds.append("EXIF rotation applied" if rendering.exif_rotate else "EXIF rotation ignored")
        image = ImageOps.exif_transpose(image) if rendering.exif_rotate else image
    if rendering.background is not None and image.mode in KINDS and image.has_transparency_data:
        opaque = Image.new("RGBA", image.size, (*rendering.background, 255))
        opaque.alpha_composite(image.convert("RGBA"))
        image, kind = opaque, "alpha"
        pixels = np.asarray(image.convert("RGB"))
    else:
        pixels, kind = _to_rgb(image)
    return pixels, tuple(name for name in (kind, *kinds) if name is not None)


def _orientation(image: Image.Image) -> int:
    """1 to 8, as EXIF numbers them; 1 for an image that does not say, or whose EXIF is damaged."""
    try:
        value = image.getexif().get(ORIENTATION, UPRIGHT)
    except Exception:  # EXIF is a format of its own, whose reader raises many types for damaged data
        return UPRIGHT
    return value if value in range(1, 9) else UPRIGHT


def _to_rgb(image: Image.Image) -> tuple[NDArray[np.uint8], str | None]:
    if image.mode in KINDS:
        return np.asarray(image.convert("RGB")), KINDS[image.mode]
    if image.mode.startswith("I"):
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise BrokenImage("32-bit integer pixels have no known white level")
        grey = (values >> 8).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2), "16-bit"
    raise BrokenImage(f"pixels of mode {image.mode} have no known white level")


def rgb_pixels(image: Image.Image, rendering: Rendering) -> NDArray[np.uint8]:
    """An open image as `decode_rgb` decodes a file, uint8 [height, width, 3]. Errors: BrokenImage, OSError."""
    return _render(image, rendering)[0]


def fitted_size(height: int, width: int, limit: int) -> tuple[int, int]:
    """Height and width after the longer side is reduced to `limit`; smaller images keep their size.

    Sides are rounded down as in FFCV, but never to zero: an image of 1 x 2000 stays one pixel high.
    """
    longer = max(height, width)
    if longer <= limit:
        return height, width
    return max(1, height * limit // longer), max(1, width * limit // longer)


def fit_longer_side(pixels: NDArray[np.uint8], limit: int) -> NDArray[np.uint8]:
    """Shrink an image [height, width, 3] to `fitted_size` by area interpolation."""
    height, width = fitted_size(pixels.shape[0], pixels.shape[1], limit)
    if (height, width) == pixels.shape[:2]:
        return pixels
    return np.asarray(cv2.resize(pixels, (width, height), interpolation=cv2.INTER_AREA), np.uint8)


def read_image(path: Path, rendering: Rendering = AS_STORED) -> tuple[NDArray[np.uint8], tuple[str, ...]]:
    """`decode_rgb` of a file. Errors: OSError if it cannot be read, BrokenImage if it cannot be decoded."""
    return decode_rgb(path.read_bytes(), rendering)


@functools.cache
def _turbojpeg() -> ctypes.CDLL:
    """The library that FFCV decodes with. Pillow is too lenient here: it accepts what libjpeg warns about."""
    library = ctypes.CDLL("libturbojpeg.so.0")
    library.tjInitDecompress.restype = ctypes.c_void_p
    library.tjDestroy.argtypes = [ctypes.c_void_p]
    library.tjGetErrorStr2.argtypes = [ctypes.c_void_p]
    library.tjGetErrorStr2.restype = ctypes.c_char_p
    size = ctypes.POINTER(ctypes.c_int)
    library.tjDecompressHeader3.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_ulong, size, size, size, size]
    library.tjDecompress2.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_ulong, ctypes.c_void_p] + 5 * [
        ctypes.c_int
    ]
    return library


def jpeg_fault(data: NDArray[np.uint8], height: int, width: int) -> str | None:
    """Why stored bytes are not a valid JPEG of this size, or None if they are. Warnings count as faults.

    The C code runs without the GIL, so threads can check in parallel.
    """
    library = _turbojpeg()
    handle = library.tjInitDecompress()
    try:
        actual_width, actual_height, subsampling, colours = (ctypes.c_int() for _ in range(4))
        source = data.ctypes.data
        if library.tjDecompressHeader3(handle, source, data.size, actual_width, actual_height, subsampling, colours):
            return library.tjGetErrorStr2(handle).decode()
        if (actual_height.value, actual_width.value) != (height, width):
            return f"a JPEG of {actual_height.value} x {actual_width.value} where {height} x {width} is recorded"
        pixels = np.empty((height, width, 3), np.uint8)
        if library.tjDecompress2(handle, source, data.size, pixels.ctypes.data, width, 0, height, TURBOJPEG_RGB, 0):
            return library.tjGetErrorStr2(handle).decode()
        return None
    finally:
        library.tjDestroy(handle)
