"""Real photographs in ImageNet's sizes, as folders of JPEGs and as an FFCV file, from pictures that Debian ships.

Debian's wallpapers are far larger than ImageNet's images: each yields many, as reduced crops of random position and
scale.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from pipeline.run.files import atomic_write_text

PACKAGES = ("mate-backgrounds", "plasma-workspace-wallpapers")
SIZES = ((500, 375), (500, 375), (500, 375), (375, 500), (500, 333), (333, 500), (400, 300), (280, 210))
"""Widths and heights in pixels: most of ImageNet's images are 500 wide or high; its mean is about 400 x 350."""
PER_PICTURE = {"train": 40, "val": 1}
SMALLEST = 1000
"""Minimum of a picture's shorter side, in pixels."""
QUALITY = 92


def _pictures(folder: Path) -> list[Path]:
    """JPEGs of the packages, unpacked below the folder. Errors: SystemExit if they cannot be fetched."""
    done = folder / "unpacked"
    if not done.exists():
        folder.mkdir(parents=True, exist_ok=True)
        print(f"fetching {', '.join(PACKAGES)} (140 MB)", file=sys.stderr)
        result = subprocess.run(["apt-get", "download", *PACKAGES], cwd=folder, capture_output=True, text=True)
        if result.returncode != 0:
            raise SystemExit(f"error: {' '.join(result.args)}: {result.stderr.strip()}; run apt-get update first")
        for package in folder.glob("*.deb"):
            subprocess.run(["dpkg-deb", "-x", str(package), str(folder)], check=True)
            package.unlink()
        atomic_write_text(done, "\n".join(PACKAGES) + "\n")
    return sorted(path for path in folder.rglob("*.jpg") if path.is_file() and not path.is_symlink())


def _random_crop(picture: Image.Image, random: np.random.Generator) -> Image.Image:
    """A crop with the aspect ratio of one of SIZES, between that size and the whole picture, reduced to that size."""
    width, height = SIZES[random.integers(len(SIZES))]
    largest = min(picture.width / width, picture.height / height)
    scale = float(np.exp(random.uniform(0.0, np.log(largest))))
    wide, high = round(scale * width), round(scale * height)
    left, top = (int(random.integers(room + 1)) for room in (picture.width - wide, picture.height - high))
    return picture.resize((width, height), Image.Resampling.LANCZOS, (left, top, left + wide, top + high))


def photographs(folder: Path) -> tuple[Path, Path]:
    """The same photographs as folders of JPEGs, one class per picture, and as an FFCV file; cached after creation."""
    images, betons = folder / "images", folder / "beton"
    done = folder / "made"
    if not done.exists():
        number = 0
        for path in tqdm(_pictures(folder / "packages"), desc="cropping photographs", unit=" pictures"):
            with Image.open(path) as picture:
                if picture.mode != "RGB" or min(picture.size) < SMALLEST:
                    continue
                picture.load()
                random = np.random.default_rng(number)
                for split, count in PER_PICTURE.items():
                    target = images / split / f"{number:03d}"
                    target.mkdir(parents=True, exist_ok=True)
                    for crop in range(count):
                        _random_crop(picture, random).save(target / f"{crop:03d}.jpg", quality=QUALITY)
            number += 1
        atomic_write_text(done, f"{number} pictures\n")
    command = [sys.executable, "-m", "launch", "data", "write", "image_folder"]
    command += ["--source", str(images), "--out", str(betons), "--quality", str(QUALITY)]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONWARNINGS": "ignore"})
    return images / "train", betons / "train.beton"
