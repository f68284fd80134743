"""Checkpoints: atomic, hashed, free of the world size, written while training goes on.

    step-0000012500/{model.safetensors, train_state.safetensors, progress.json, MANIFEST.json}    LATEST

A checkpoint exists when its MANIFEST.json exists and agrees with the other files (names, sizes, SHA-256); it is written
last. `LATEST` is replaced by rename and is a convenience for people: resuming looks at the manifests. Tensors carry
plain names: `weight/conv1.weight`, `score/conv1.weight`, `buffer/bn1.running_mean`,
`optim/score/conv1.weight/momentum_buffer`. Only rank 0 writes.
"""

from __future__ import annotations

import logging
import re
import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from pipeline.files import atomic_write_json, atomic_write_text, fsync_file, fsync_folder, read_json, sha256_of
from pipeline.progress import Progress

log = logging.getLogger(__name__)

CONTENT = ("model.safetensors", "train_state.safetensors", "progress.json")
FOLDER = re.compile(r"step-(\d{10})$")

Tensors = dict[str, torch.Tensor]


class CheckpointDamaged(ValueError):
    """A checkpoint whose files do not agree with its manifest."""


@dataclass(frozen=True)
class Snapshot:
    """Everything a checkpoint holds, in CPU memory and owned (later steps do not change it)."""

    model: Tensors
    optimizer: Tensors
    progress: Progress


def folder_of(stage: Path, step: int) -> Path:
    return stage / f"step-{step:010d}"


def steps_on_disk(stage: Path) -> list[int]:
    """Steps of all checkpoint folders, whole or not, oldest first."""
    if not stage.is_dir():
        return []
    return sorted(int(m.group(1)) for m in (FOLDER.match(p.name) for p in stage.iterdir()) if m)


def _manifest(folder: Path, step: int) -> dict[str, Any]:
    files = {name: {"bytes": (folder / name).stat().st_size, "sha256": sha256_of(folder / name)} for name in CONTENT}
    return {"format": 1, "step": step, "files": files}


def write(stage: Path, snapshot: Snapshot, before_manifest: Callable[[], None] | None = None) -> Path:
    """Write one checkpoint so that it appears whole or not at all. `before_manifest` may refuse by raising.

    Errors: FileExistsError if the step has a checkpoint: a run writes each step once, so another process is at work.
    """
    folder = folder_of(stage, snapshot.progress.step)
    if (folder / "MANIFEST.json").exists():
        raise FileExistsError(f"{folder} is there already, so another process writes this stage; nothing was written")
    if folder.exists():
        shutil.rmtree(folder)  # left by a writer that died: without a manifest it never existed
    folder.mkdir(parents=True)
    save_file(snapshot.model, folder / CONTENT[0])
    save_file(snapshot.optimizer, folder / CONTENT[1])
    atomic_write_json(folder / CONTENT[2], snapshot.progress.to_json())
    for name in CONTENT[:2]:
        fsync_file(folder / name)
    if before_manifest is not None:
        before_manifest()
    atomic_write_json(folder / "MANIFEST.json", _manifest(folder, snapshot.progress.step))
    fsync_folder(stage)
    atomic_write_text(stage / "LATEST", folder.name + "\n")
    return folder


def check(folder: Path) -> None:
    """Raise CheckpointDamaged unless the manifest exists and says exactly what the folder and its files are."""
    try:
        said = read_json(folder / "MANIFEST.json")
        said_files = dict(said["files"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointDamaged(f"{folder}: no usable MANIFEST.json ({error})") from None
    for name in CONTENT:
        if not (folder / name).is_file():
            raise CheckpointDamaged(f"{folder / name} is missing")
    found = _manifest(folder, int(folder.name.removeprefix("step-")))
    if said != found:
        odd = [name for name in CONTENT if said_files.get(name) != found["files"][name]] or ["its step or format"]
        raise CheckpointDamaged(f"{folder} is not what its MANIFEST.json says: {', '.join(odd)}")


def read(folder: Path) -> Snapshot:
    """Check and load one checkpoint to CPU. Errors: CheckpointDamaged."""
    check(folder)
    try:
        model, optimizer = load_file(folder / CONTENT[0]), load_file(folder / CONTENT[1])
        progress = Progress.from_json(read_json(folder / CONTENT[2]))
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise CheckpointDamaged(f"{folder} cannot be read: {error}") from None
    return Snapshot(model, optimizer, progress)


def read_newest(stage: Path) -> Snapshot | None:
    """The newest whole checkpoint of a stage; damaged ones are passed over, loudly, for the one before."""
    for step in reversed(steps_on_disk(stage)):
        folder = folder_of(stage, step)
        if not (folder / "MANIFEST.json").exists():
            log.warning("%s was being written when its writer ended; it is passed over", folder)
            continue
        try:
            return read(folder)
        except CheckpointDamaged as error:
            log.error("damaged checkpoint passed over: %s", error)
    return None


def newest_step(stage: Path) -> int:
    """Step of the newest checkpoint that has a manifest, 0 if none: cheap, for progress, not for loading."""
    return max((s for s in steps_on_disk(stage) if (folder_of(stage, s) / "MANIFEST.json").exists()), default=0)


def prune(stage: Path, keep: int, protected: int | None) -> None:
    """Delete all but the newest `keep` checkpoints and the `protected` step (the best one)."""
    steps = [s for s in steps_on_disk(stage) if s != protected]
    for step in steps[:-keep]:
        folder = folder_of(stage, step)
        (folder / "MANIFEST.json").unlink(missing_ok=True)  # first: what is half deleted does not exist
        shutil.rmtree(folder)


def discard_after(stage: Path, step: int) -> None:
    """Delete folders beyond `step`: unfinished or damaged ones that the resumed run will write again."""
    for later in steps_on_disk(stage):
        if later > step:
            shutil.rmtree(folder_of(stage, later))


class Writer:
    """Writes checkpoints in a thread of its own, one at a time; an error is raised at the next call."""

    def __init__(self, stage: Path, keep: int, guard: Callable[[int], None]) -> None:
        """`guard(step)` is called before the manifest and raises to refuse (the lease was lost)."""
        self._stage, self._keep, self._guard = stage, keep, guard
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def submit(self, snapshot: Snapshot) -> None:
        self.wait()
        self._thread = threading.Thread(target=self._write, args=(snapshot,), name="checkpoint-writer", daemon=True)
        self._thread.start()

    def _write(self, snapshot: Snapshot) -> None:
        try:
            step = snapshot.progress.step
            write(self._stage, snapshot, lambda: self._guard(step))
            prune(self._stage, self._keep, snapshot.progress.best_step)
        except BaseException as error:
            self._error = error

    def wait(self) -> None:
        """Return when nothing is being written. Errors: whatever the last write raised."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error
