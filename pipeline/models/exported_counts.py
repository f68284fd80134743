"""Checks that an exported network is the one that its stage's result.json describes."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError, safe_open

from pipeline.models.pruning.topk import masks_sha256
from pipeline.run.files import sha256_of
from pipeline.run.records import StageResult


def check_exported(path: Path, result: StageResult) -> None:
    """Compare the network in `path` with its stage's result; a file that is not there, as to save space, is not.

    Kept weights may be zero, so that a layer has at most as many nonzero weights as it keeps, and exactly as many if
    their positions hash to the mask's SHA-256. Errors: ValueError naming what differs.
    """
    names = [layer.name for layer in result.layers]
    if len(set(names)) < len(names) or (result.mask_sha256 is not None and not names):
        raise ValueError(f"{path.with_name('result.json')} is damaged: no layers, or one of them twice; {result.FIX}")
    if not path.exists():
        return
    try:
        if sha256_of(path) != result.model_sha256:
            raise ValueError(
                f"{path} is not the network that the stage exported (its sha256 differs from result.json); "
                "restore that file"
            )
        with safe_open(path, framework="pt") as stream:
            present_names = set(stream.keys())
            nonzero = {name: stream.get_tensor(name) != 0 for name in names if name in present_names}
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}; restore it") from None
    exact = result.mask_sha256 is not None and masks_sha256(nonzero) == result.mask_sha256
    for layer in result.layers:
        present = nonzero.get(layer.name)
        total, count = (present.numel(), int(present.sum())) if present is not None else (0, 0)
        wrong = count != layer.kept if exact else count > layer.kept
        if total != layer.total or wrong or (result.mask_sha256 is None and layer.kept != layer.total):
            raise ValueError(
                f"{path.with_name('result.json')} is damaged: it says that {layer.name} keeps {layer.kept:,} of "
                f"{layer.total:,} connections, and model.safetensors has {count:,} of {total:,}; restore it"
            )
