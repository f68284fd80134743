"""Preprocessing of one image: exactly the pixels that the loader gives for a test file with that image in it."""

from __future__ import annotations

import os
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.data.loading.loader import Loader
from pipeline.data.loading.preprocessing import Preprocessing
from pipeline.data.loading.sampling import evaluation_crops
from pipeline.data.manifest import DataError, read_manifest
from pipeline.data.sources.decode import ORIENTATION, Rendering
from pipeline.data.sources.image_folder import FolderOptions
from pipeline.data.writing.write import WriteOptions, write_dataset

SHAPES = [(96, 80), (70, 190), (73, 73), (300, 200), (41, 60), (64, 64)]


def photograph(rng: np.random.Generator, height: int, width: int) -> Image.Image:
    coarse = rng.integers(0, 256, (height // 8 + 2, width // 8 + 2, 3), dtype=np.uint8)
    return Image.fromarray(cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC))


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    """The folder of the FFCV files, and the test images in their order: JPEG turned by EXIF, PNG, grey, palette, CMYK,
    transparent."""
    rng, folder = np.random.default_rng(0), tmp_path_factory.mktemp("photographs")
    files = []
    for n in range(30):
        for split in ("train", "val"):
            image = photograph(rng, *SHAPES[n % len(SHAPES)])
            image = image.convert(("RGB", "RGB", "L", "P", "CMYK", "RGBA")[n % 6])
            if image.mode == "RGBA":
                image.putalpha(Image.fromarray(rng.integers(0, 256, image.size[::-1], dtype=np.uint8)))
            path = folder / "tree" / split / f"class-{n // 10}" / f"{n:02}.{'png' if n % 6 in (3, 5) else 'jpg'}"
            path.parent.mkdir(parents=True, exist_ok=True)
            image.getexif()[ORIENTATION] = 6 if n % 6 == 0 else 1
            image.save(path, exif=image.getexif())
        files.append(path)
    options = WriteOptions(workers=1, max_resolution=150, jpeg_quality=85)
    rendered = FolderOptions(rendering=Rendering(background=(10, 200, 30), exif_rotate=True))
    write_dataset("image_folder", folder / "tree", folder, options, False, lambda *_: None, folder=rendered)
    return folder, files


def loaded(path: Path, size: int, augmentation: str) -> torch.Tensor:
    """Every image of a file as an evaluation reads it."""
    with Loader(path, image_size=size, threads=1) as loader:
        crops = evaluation_crops(augmentation, loader.heights, loader.widths, size)
        return loader.read(np.arange(loader.num_samples), crops).to(torch.device("cpu"))[0]


@pytest.mark.parametrize("augmentation", ["random_resized_crop", "none"])
@pytest.mark.parametrize("size", [48, 64, 224])
def test_it_gives_the_loaders_pixels(photographs: tuple[Path, list[Path]], size: int, augmentation: str) -> None:
    folder, files = photographs
    expected = loaded(folder / "test.beton", size, augmentation)
    manifest = read_manifest(folder / "test.beton")
    assert manifest.image_mode == "jpg"
    preprocess = Preprocessing.of(manifest, size, augmentation)
    for file, image in zip(files, expected, strict=True):
        assert torch.equal(preprocess(file), image), file
        assert torch.equal(preprocess(str(file)), image)
        with Image.open(file) as opened:
            assert torch.equal(preprocess(opened), image)
    assert Preprocessing.model_validate(preprocess.to_json()) == preprocess
    guess = torch.from_numpy(np.stack([np.asarray(Image.open(f).convert("RGB").resize((size, size))) for f in files]))
    assert not torch.equal(guess.permute(0, 3, 1, 2).float() / 255, expected), "the obvious guess is another image"


def test_small_images_are_stored_as_they_are(fashion_data: Path, tmp_path: Path) -> None:
    expected = loaded(fashion_data / "test.beton", 28, "pad_crop")
    preprocess = Preprocessing.of(read_manifest(fashion_data / "test.beton"), 28, "pad_crop")
    assert preprocess.image_mode == "raw"
    for n in (0, 7, 99):
        Image.fromarray((255 * expected[n, 0]).round().byte().numpy()).save(tmp_path / "one.png")
        assert torch.equal(preprocess(tmp_path / "one.png"), expected[n])


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    preprocess = Preprocessing(image_size=8, augmentation="none", image_mode="raw", max_resolution=500, jpeg_quality=90)
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "empty.png").touch()
    os.mkfifo(tmp_path / "fifo.png")
    for name, reason in (
        ("text.png", "cannot be read: not an image of any known format"),
        ("empty.png", "cannot be read: not an image of any known format"),
        ("none.png", "cannot be read: No such file or directory"),
        ("fifo.png", "is not an image file"),
        (".", "is not an image file"),
    ):
        with pytest.raises(DataError, match=reason) as caught:
            preprocess(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value)
    with pytest.raises(DataError, match="the image cannot be read: pixels of mode F have no known white level"):
        preprocess(Image.new("F", (8, 8)))
