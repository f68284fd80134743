"""Checkpoints: atomic, hashed, free of the world size, written while training goes on.

    step-0000012500/{model.safetensors, train_state.safetensors, progress.json, MANIFEST.json}    LATEST

A checkpoint exists when its MANIFEST.json exists and agrees with the other files (names, sizes, SHA-256); it is written
last. `LATEST` is replaced by rename and is a convenience for people: resuming looks at the manifests. Tensors carry
plain names: `weight/conv1.weight`, `score/conv1.weight`, `buffer/bn1.running_mean`,
`optim/score/conv1.weight/momentum_buffer`. Only rank 0 writes.

The manifest's hashes are of the bytes in memory, not of what a file system gave back, so that a lost write is noticed.
Errors that pass (a network file system's server is away for a moment) are waited out; a checkpoint that cannot be read
because of one is not taken for a damaged one, as damaged ones are passed over and deleted.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from pipeline.run.disk import DiskFull, Pause, free_bytes, readable, retried
from pipeline.run.files import atomic_write_json, atomic_write_text, fsync_folder, naming
from pipeline.run.progress import Progress

log = logging.getLogger(__name__)

CONTENT = ("model.safetensors", "train_state.safetensors", "progress.json")
FOLDER = re.compile(r"step-(\d{10})$")
MARGIN_BYTES = 1 << 20
"""Names and shapes, progress, manifest, and the blocks of a file system."""
COMFORTABLE = 3
"""Checkpoints that should still fit; with less room than that, one warning."""

Tensors = dict[str, torch.Tensor]


class CheckpointDamaged(ValueError):
    """A checkpoint whose files do not agree with its manifest."""


@dataclass(frozen=True)
class Snapshot:
    """Everything a checkpoint holds, in CPU memory and owned (later steps do not change it)."""

    model: Tensors
    train_state: Tensors
    """What else training continues from: the optimizer's state, an average of the weights."""
    progress: Progress


def folder_of(stage: Path, step: int) -> Path:
    return stage / f"step-{step:010d}"


def steps_on_disk(stage: Path) -> list[int]:
    """Steps of all checkpoint folders, whole or not, oldest first."""
    if not stage.is_dir():
        return []
    return sorted(int(m.group(1)) for m in (FOLDER.match(p.name) for p in stage.iterdir()) if m)


def _manifest(step: int, files: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return {"format": 1, "step": step, "files": files}


def _facts(data: bytes) -> dict[str, Any]:
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def _write_file(path: Path, data: bytes) -> dict[str, Any]:
    """Write a file and flush it to disk; returns what it must be from now on."""
    with naming(path), path.open("xb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    return _facts(data)


def needed_bytes(snapshot: Snapshot) -> int:
    """Room that a checkpoint takes on disk, a little too much rather than too little."""
    tensors = (*snapshot.model.values(), *snapshot.train_state.values())
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors) + MARGIN_BYTES


def write_checkpoint(
    stage: Path, snapshot: Snapshot, before_manifest: Callable[[], None] | None = None, again: bool = False
) -> Path:
    """Write one checkpoint so that it appears whole or not at all. `before_manifest` may refuse by raising.

    `again`: this process has tried before, and what there is of the step is its own.

    Errors: FileExistsError if the step has a checkpoint: a run writes each step once, so another process is at work.
    DiskFull, before anything is written. OSError for everything else that a file system says.
    """
    folder = folder_of(stage, snapshot.progress.step)
    if (folder / "MANIFEST.json").exists():
        if not again:
            raise FileExistsError(f"{folder} is there already, so another process writes this stage; this one did not")
        (folder / "MANIFEST.json").unlink()
    if folder.exists():
        shutil.rmtree(folder)  # left by a writer that died: without a manifest it never existed
    needed, free = needed_bytes(snapshot), free_bytes(stage)
    if free is not None and free < needed:
        log.error("%s: a checkpoint needs %d bytes and %d are free", stage, needed, free)
        # Without what is free, which is another number after every restart: the same failure must read the same.
        raise DiskFull(
            errno.ENOSPC,
            f"a checkpoint needs {needed} bytes, more than are free, so nothing was written; make room, then resume",
            str(stage),
        )
    folder.mkdir(parents=True)
    progress = json.dumps(snapshot.progress.to_json(), indent=1) + "\n"
    files = {
        CONTENT[0]: _write_file(folder / CONTENT[0], save(snapshot.model)),
        CONTENT[1]: _write_file(folder / CONTENT[1], save(snapshot.train_state)),
        CONTENT[2]: _write_file(folder / CONTENT[2], progress.encode()),
    }
    fsync_folder(folder)
    if before_manifest is not None:
        before_manifest()
    atomic_write_json(folder / "MANIFEST.json", _manifest(snapshot.progress.step, files))
    fsync_folder(stage)
    atomic_write_text(stage / "LATEST", folder.name + "\n")
    return folder


def _contents(folder: Path) -> dict[str, bytes]:
    """What the files hold, which is what the manifest says. Errors: those of `check`."""
    contents: dict[str, bytes] = {}
    for name in ("MANIFEST.json", *CONTENT):
        try:
            contents[name] = (folder / name).read_bytes()
        except FileNotFoundError:
            raise CheckpointDamaged(f"{folder / name} is missing") from None
    try:
        said = json.loads(contents.pop("MANIFEST.json"))
        said_files = dict(said["files"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointDamaged(f"{folder}: no usable MANIFEST.json ({error})") from None
    found = _manifest(int(folder.name.removeprefix("step-")), {name: _facts(contents[name]) for name in CONTENT})
    if said != found:
        odd = [name for name in CONTENT if said_files.get(name) != found["files"][name]] or ["its step or format"]
        raise CheckpointDamaged(f"{folder} is not what its MANIFEST.json says: {', '.join(odd)}")
    return contents


def check_checkpoint(folder: Path) -> None:
    """Raise CheckpointDamaged unless the manifest exists and says exactly what the folder and its files are.

    Errors: OSError for a file that cannot be read, of which nothing is known then.
    """
    _contents(folder)


def _read(folder: Path) -> Snapshot:
    contents = _contents(folder)
    try:
        model, train_state = load(contents[CONTENT[0]]), load(contents[CONTENT[1]])
        progress = Progress.from_json(json.loads(contents[CONTENT[2]]))
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise CheckpointDamaged(f"{folder} cannot be read: {error}") from None
    return Snapshot(model, train_state, progress)


def read_checkpoint(folder: Path, pause: Pause | None = None) -> Snapshot:
    """Check and load one checkpoint to CPU, with pauses while the file system has an error that may pass.

    Errors: CheckpointDamaged; OSError if the file system goes on failing.
    """
    return retried(lambda _: _read(folder), f"reading {folder}", pause)


def read_newest_checkpoint(stage: Path) -> Snapshot | None:
    """The newest whole checkpoint of a stage; damaged ones are passed over, loudly, for the one before.

    Errors: OSError for one that cannot be read: it may be whole, and who goes on from an older one deletes it.
    """
    for step in reversed(steps_on_disk(stage)):
        folder = folder_of(stage, step)
        if not (folder / "MANIFEST.json").exists():
            log.warning("%s was being written when its writer ended; it is passed over", folder)
            continue
        try:
            return read_checkpoint(folder)
        except CheckpointDamaged as error:
            log.error("damaged checkpoint passed over: %s", error)
    return None


def committed_steps(stage: Path) -> list[int]:
    """Steps whose checkpoints were once complete, damaged since or not."""
    return [step for step in steps_on_disk(stage) if (folder_of(stage, step) / "MANIFEST.json").exists()]


def delete_old_checkpoints(stage: Path, keep: int, *protected: int | None) -> None:
    """Delete all but the newest `keep` checkpoints and the `protected` steps (the best, the one to go back to)."""
    steps = [s for s in steps_on_disk(stage) if s not in protected]
    for step in steps[:-keep]:
        folder = folder_of(stage, step)
        (folder / "MANIFEST.json").unlink(missing_ok=True)  # first: what is half deleted does not exist
        shutil.rmtree(folder)


def delete_checkpoints_after(stage: Path, step: int) -> None:
    """Delete folders beyond `step`: unfinished or damaged ones that the resumed run will write again."""
    for later in steps_on_disk(stage):
        if later > step:
            shutil.rmtree(folder_of(stage, later))


class Writer:
    """Writes checkpoints in a thread of its own, one at a time; an error is raised at the next call.

    File system errors that may pass are waited out there. Training goes on meanwhile, until the next checkpoint is due.
    """

    def __init__(self, stage: Path, keep: int, guard: Callable[[int], None], pause: Pause | None = None) -> None:
        """`guard(step)` is called before the manifest and raises to refuse (the lease was lost)."""
        self._stage, self._keep, self._guard, self._pause = stage, keep, guard, pause
        self._warned = False
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def submit(self, snapshot: Snapshot) -> None:
        self.wait()
        self._thread = threading.Thread(target=self._write, args=(snapshot,), name="checkpoint-writer", daemon=True)
        self._thread.start()

    def _write(self, snapshot: Snapshot) -> None:
        step, protected = snapshot.progress.step, (snapshot.progress.best_step, snapshot.progress.good_step)

        def attempt(number: int) -> None:
            if number == 0:
                self._warn_of_little_room(snapshot)
            else:
                self._guard(step)  # while we waited, a successor may have begun: what there is would be its own
            write_checkpoint(self._stage, snapshot, lambda: self._guard(step), again=number > 0)

        try:
            retried(attempt, f"writing {folder_of(self._stage, step)}", self._pause)
            retried(
                lambda _: delete_old_checkpoints(self._stage, self._keep, *protected),
                f"deleting from {self._stage}",
                self._pause,
            )
        except BaseException as error:
            self._error = error

    def _warn_of_little_room(self, snapshot: Snapshot) -> None:
        needed, free = needed_bytes(snapshot), free_bytes(self._stage)
        if not self._warned and free is not None and free < COMFORTABLE * needed:
            self._warned = True
            log.warning(
                "%s: %s are free and a checkpoint takes %s; make room before the disk is full",
                self._stage,
                readable(free),
                readable(needed),
            )

    def wait(self) -> None:
        """Return when nothing is being written. Errors: whatever the last write raised."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error
