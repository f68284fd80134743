"""SVHN's cropped digits (Netzer et al. 2011) as their authors distribute them: MATLAB files with `X` and `y`.

X is uint8 [32, 32, 3, n]; y has labels 1 to 10, where 10 is the digit 0. A digit's label here is the digit.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import scipy.io
from numpy.typing import NDArray

from pipeline.data.manifest import DataError
from pipeline.data.sources.source import Source, arrays_sha256, download, entry, images_of, labels_of, md5_of

FILES = {"train": "train_32x32.mat", "test": "test_32x32.mat"}
MD5 = {
    "train_32x32.mat": "e26dedcc434d2e4c54c9b2d4a06d8373",
    "test_32x32.mat": "eb5a983be6a315427106f1b164d9cef3",
}
"""As torchvision publishes them for the authors' files."""
URL = "http://ufldl.stanford.edu/housenumbers/"
DIGITS = tuple("0123456789")


def svhn(split: str, source: Path | None) -> Source:
    """One split of SVHN; `source` is the folder with the two files, None downloads them. Errors: DataError."""
    name = FILES[split]
    path = download(URL + name, name, MD5[name]) if source is None else source / name
    if not path.is_file():
        raise DataError(f"{source} lacks {name}; get {' and '.join(FILES.values())} from {URL}")
    images, labels = read_digits(path)
    return Source(
        dataset="svhn",
        split=split,
        location=str(path.parent.resolve()),
        class_names=DIGITS,
        labels=labels,
        names=[f"{name}[{i}]" for i in range(len(labels))],
        sha256=arrays_sha256(images, labels),
        read=lambda i: (np.ascontiguousarray(images[i]), ()),
        authors_md5={name: md5_of(path) == MD5[name]},
    )


def read_digits(path: Path) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """One of the authors' files as (images [n, 32, 32, 3], labels [n] in 0..9). Errors: DataError naming the file."""
    try:
        contents = scipy.io.loadmat(path, variable_names=("X", "y"))
    except Exception as error:
        # scipy's readers raise many types for damaged files, zlib.error and TypeError among them.
        raise DataError(f"{path} cannot be read: {type(error).__name__}: {error}; get it again from {URL}") from None
    stored, digits = entry(contents, "X", path), entry(contents, "y", path)
    images = images_of(stored.transpose(3, 0, 1, 2) if stored.ndim == 4 else stored, (32, 32, 3), path)
    return images, labels_of(np.where(digits == 10, 0, digits).reshape(-1), len(images), len(DIGITS), path)
