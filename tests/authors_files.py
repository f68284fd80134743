"""Small files in the formats in which the authors of data sets distribute them, written without the project's code."""

from __future__ import annotations

import io
import struct
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import scipy.io

CIFAR10_NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def _python2(value: object) -> bytes:
    """The opcodes that Python 2's cPickle, protocol 2, writes for a value (without its memo, which nothing needs)."""
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
    """A whole pickle of text, integers, lists, dicts and arrays."""
    return b"\x80\x02" + _python2(value) + b"."


def cifar_files(dataset: str, rng: np.random.Generator, per_batch: int) -> dict[str, bytes]:
    """Name -> content of the files of cifar10 or cifar100, with `per_batch` images of random pixels in each batch."""

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
    """A tar of files in the given order; mode 'w:gz' for a compressed one."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode=mode, format=tarfile.GNU_FORMAT, **options) as tar:  # type: ignore[call-overload]
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return stream.getvalue()


def write_svhn(path: Path, rng: np.random.Generator, count: int) -> None:
    """A compressed MATLAB 5 file with X and y; labels 1 to 10 all occur if there are ten images or more."""
    labels = (np.arange(count) % 10 + 1).astype(np.uint8)[:, None]
    images = rng.integers(0, 256, (32, 32, 3, count), dtype=np.uint8)
    scipy.io.savemat(path, {"X": images, "y": labels}, do_compression=True)


def devkit(wnids: Sequence[str], validation: Sequence[str]) -> bytes:
    """The devkit's archive: `wnids` are classes 1, 2, ... in this order, among two synsets that are none."""
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
