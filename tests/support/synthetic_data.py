"""Small synthetic data for tests.

- Files in the formats in which the authors of CIFAR, SVHN and ImageNet distribute them, written without the project's
  code, so that its readers are tested against an independent writer.
- A folder tree of images like ImageNet's, some of them broken on purpose.
- A classification task of 10 x 10 pixels, and a network trained on it that resists some attacks.
"""

from __future__ import annotations

import io
import math
import struct
import tarfile
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
import scipy.io
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.recipe.objective import ThreatModel

CIFAR10_NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
BROKEN = {
    "truncated": lambda data: data[: len(data) * 2 // 3],
    "empty": lambda data: b"",
    "text": lambda data: b"404 not found\n",
    "zeroed": lambda data: bytes(len(data)),
}
"""Way of breaking a file -> function from its bytes to those of the broken file."""
SIDE, CLASSES = 10, 4
"""Image size in pixels and number of classes of the classification task."""
BALLS = {
    "linf": ThreatModel(norm="linf", eps=Fraction(7, 100)),
    "l2": ThreatModel(norm="l2", eps=Fraction(1, 2)),
}
"""Threat models under which `trained_network` is robust to some attacks and not to others."""


# --- files in their authors' formats ---------------------------------------------------------------------------------


def _python2(value: object) -> bytes:
    """The opcodes that Python 2's cPickle writes for a value in protocol 2, without its memo, which is optional."""
    if isinstance(value, str):
        data = value.encode("latin-1")
        return (b"U" + bytes([len(data)]) if len(data) < 256 else b"T" + struct.pack("<i", len(data))) + data
    if isinstance(value, int):
        return b"K" + bytes([value]) if 0 <= value < 256 else b"J" + struct.pack("<i", value)
    if isinstance(value, Mapping):
        return b"}(" + b"".join(_python2(key) + _python2(item) for key, item in value.items()) + b"u"
    if isinstance(value, np.ndarray):
        empty = b"cnumpy.core.multiarray\n_reconstruct\n" + b"cnumpy\nndarray\n" + b"K\x00\x85" + b"U\x01b\x87R"
        kind = b"cnumpy\ndtype\n" + _python2(value.dtype.str[1:]) + b"K\x00K\x01\x87R"
        kind += b"(K\x03" + _python2(value.dtype.str[0]) + b"NNN" + _python2(-1) * 2 + b"K\x00tb"
        shape = b"".join(map(_python2, value.shape)) + {1: b"\x85", 2: b"\x86", 4: b"t"}[value.ndim]
        shape = b"(" + shape if value.ndim > 3 else shape
        return empty + b"(K\x01" + shape + kind + b"\x89" + _python2(value.tobytes().decode("latin-1")) + b"tb"
    assert isinstance(value, Sequence)
    return b"](" + b"".join(map(_python2, value)) + b"e"


def python2_pickle(value: object) -> bytes:
    """A complete pickle of text, integers, lists, dicts and arrays."""
    return b"\x80\x02" + _python2(value) + b"."


def cifar_files(dataset: str, rng: np.random.Generator, per_batch: int) -> dict[str, bytes]:
    """File name -> content of cifar10 or cifar100, with `per_batch` images of random pixels in each batch."""

    def batch(title: str, labels: str, num_classes: int) -> bytes:
        values = {
            "batch_label": title,
            labels: rng.permutation(np.arange(per_batch) % num_classes).tolist(),
            "data": rng.integers(0, 256, (per_batch, 3072), dtype=np.uint8),
            "filenames": [f"picture_s_{i:06}.png" for i in range(per_batch)],
        }
        if labels == "fine_labels":
            values["coarse_labels"] = rng.integers(0, 20, per_batch).tolist()
        return python2_pickle(values)

    if dataset == "cifar10":
        names = [*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"]
        meta = {"num_cases_per_batch": per_batch, "label_names": list(CIFAR10_NAMES), "num_vis": 3072}
        return {**{name: batch(name, "labels", 10) for name in names}, "batches.meta": python2_pickle(meta)}
    fine, coarse = [f"fine {i:02}" for i in range(100)], [f"coarse {i:02}" for i in range(20)]
    meta = python2_pickle({"fine_label_names": fine, "coarse_label_names": coarse})
    return {**{name: batch(name, "fine_labels", 100) for name in ("train", "test")}, "meta": meta}


def tar_of(files: Mapping[str, bytes], mode: str = "w", **options: int) -> bytes:
    """A tar of the files in the given order; mode 'w:gz' compresses it."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode=mode, format=tarfile.GNU_FORMAT, **options) as tar:  # type: ignore[call-overload]
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return stream.getvalue()


def write_svhn(path: Path, rng: np.random.Generator, count: int) -> None:
    """Write a compressed MATLAB 5 file with X and y; all labels 1 to 10 occur if there are ten images or more."""
    labels = (np.arange(count) % 10 + 1).astype(np.uint8)[:, None]
    images = rng.integers(0, 256, (32, 32, 3, count), dtype=np.uint8)
    scipy.io.savemat(path, {"X": images, "y": labels}, do_compression=True)


def devkit(wnids: Sequence[str], validation: Sequence[str]) -> bytes:
    """The devkit's archive: `wnids` are classes 1, 2, ... in this order; two further synsets are not classes."""
    fields = ("ILSVRC2012_ID", "WNID", "words", "gloss", "num_children", "children", "wordnet_height")
    rows = [(n + 1, wnid, f"word of {wnid}, other", "a gloss", 0, np.zeros((1, 0)), 0) for n, wnid in enumerate(wnids)]
    for n, wnid in enumerate(("n00001740", "n00001930"), start=len(rows) + 1):
        rows.append((n, wnid, "entity", "what is", 2, np.array([[1, 2]]), 3))
    synsets = np.array(rows, dtype=[(name, object) for name in fields])[:, None]
    meta = io.BytesIO()
    scipy.io.savemat(meta, {"synsets": synsets})
    truth = "".join(f"{wnids.index(wnid) + 1}\n" for wnid in validation)
    root = "ILSVRC2012_devkit_t12"
    files = {f"{root}/readme.txt": b"a readme", f"{root}/data/ILSVRC2012_validation_ground_truth.txt": truth.encode()}
    return tar_of({**files, f"{root}/data/meta.mat": meta.getvalue()}, "w:gz")


# --- a tree of images like ImageNet's --------------------------------------------------------------------------------


def class_name(label: int) -> str:
    """A name like a WordNet id; names sort by label."""
    return f"n{label + 1:08d}"


def picture(rng: np.random.Generator, label: int, height: int, width: int) -> Image.Image:
    """A smooth RGB image whose colours depend on the label, so that a network can learn it."""
    colours = np.random.default_rng(label).integers(0, 256, (2, 2, 3))
    noise = rng.integers(-40, 41, (4, 4, 3))
    coarse = np.clip(np.kron(colours, np.ones((2, 2, 1))) + noise, 0, 255).astype(np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, format: str = "JPEG") -> bytes:
    stream = io.BytesIO()
    image.save(stream, format)
    return stream.getvalue()


def make_imagenet_tree(
    folder: Path,
    num_classes: int,
    per_class: int,
    seed: int,
    val_per_class: int,
    sizes: tuple[int, int] = (65, 160),
    broken: tuple[str, ...] = (),
) -> list[Path]:
    """Write folder/train/<class>/*.JPEG and folder/val/<class>/*.JPEG; returns the files broken on purpose.

    Heights and widths are drawn from `sizes` in pixels, inclusive. Of every ten images of a split the second is grey,
    the fifth CMYK and the ninth a PNG, all named .JPEG. For each i < len(broken), class i of train has one more file,
    broken as broken[i], a key of BROKEN, says.
    """
    rng = np.random.default_rng(seed)
    broken_files = []
    for split, count in (("train", per_class), ("val", val_per_class)):
        number = 0
        for label in range(num_classes):
            class_folder = folder / split / class_name(label)
            class_folder.mkdir(parents=True)
            for i in range(count):
                height, width = (int(side) for side in rng.integers(sizes[0], sizes[1] + 1, 2))
                image = picture(rng, label, height, width)
                kind = number % 10
                mode = {1: "L", 4: "CMYK"}.get(kind, "RGB")
                data = encoded(image.convert(mode), "PNG" if kind == 8 else "JPEG")
                path = class_folder / f"{class_name(label)}_{i}.JPEG"
                path.write_bytes(data)
                number += 1
    for label, way in enumerate(broken):
        path = folder / "train" / class_name(label) / f"{class_name(label)}_broken.JPEG"
        path.write_bytes(BROKEN[way](encoded(picture(rng, label, sizes[1], sizes[1]))))
        broken_files.append(path)
    return broken_files


# --- a classification task -------------------------------------------------------------------------------------------


def draw(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images float32 [count, 1, 10, 10] in [0, 1] and labels int64 [count]: noisy waves, whose angle is the class."""
    generator = torch.Generator().manual_seed(seed)
    angles = torch.arange(CLASSES) * math.pi / CLASSES
    rows, columns = torch.meshgrid(torch.arange(float(SIDE)), torch.arange(float(SIDE)), indexing="ij")
    waves = torch.sin(1.2 * (angles.cos()[:, None, None] * rows + angles.sin()[:, None, None] * columns))
    y = torch.randint(0, CLASSES, (count,), generator=generator)
    noise = torch.randn(count, SIDE, SIDE, generator=generator)
    return (0.5 + 0.12 * waves[y] + 0.12 * noise).clamp(0, 1)[:, None], y


def trained_network(steps: int = 25) -> nn.Module:
    """A two-layer network in eval mode, with about 90 % clean accuracy."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Flatten(), nn.Linear(SIDE * SIDE, 32), nn.ReLU(), nn.Linear(32, CLASSES))
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    for step in range(steps):
        x, y = draw(128, seed=1 + step)
        optimizer.zero_grad()
        F.cross_entropy(network(x), y).backward()
        optimizer.step()
    network.zero_grad()
    return network.eval()
