"""Checkpoints: atomic, hashed, independent of the world size, written while training continues.

    step-0000012500/{model.safetensors, train_state.safetensors, progress.json, MANIFEST.json}    LATEST

A checkpoint exists if its MANIFEST.json, which is written last, exists and matches the other files (names, sizes and
SHA-256). `LATEST` is replaced by rename and is for people only: resuming reads the manifests. Tensors have plain names:
`weight/conv1.weight`, `score/conv1.weight`, `buffer/bn1.running_mean`,
`optim/score/conv1.weight/momentum_buffer`. Only rank 0 writes.

The manifest's hashes are of the bytes in memory and not of what the file system returns, so that a lost write is
detected. Transient errors (a network file system's server is briefly unreachable) are retried; a checkpoint that cannot
be read because of one does not count as damaged, since damaged ones are skipped and deleted.
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

from pipeline.regular_file import NotARegularFile, read_regular
from pipeline.run.disk import DiskFull, Pause, free_bytes, readable, retried
from pipeline.run.files import atomic_write_json, atomic_write_text, fsync_folder, naming, parse_json
from pipeline.run.progress import Progress

log = logging.getLogger(__name__)

CONTENT = ("model.safetensors", "train_state.safetensors", "progress.json")
FOLDER = re.compile(r"step-(\d{10})")
MARGIN_BYTES = 1 << 20
"""Allowance for tensor names and shapes, progress, manifest and file system blocks."""
WARNING_LEVEL = 3
"""Free space, in checkpoints, below which a warning is logged once."""

Tensors = dict[str, torch.Tensor]


class CheckpointDamaged(ValueError):
    """A checkpoint whose files do not match its manifest."""


@dataclass(frozen=True)
class Snapshot:
    """Contents of a checkpoint, copied to CPU memory, so that later steps do not change them."""

    model: Tensors
    train_state: Tensors
    """Other state that training resumes from, such as the optimizer's and the averaged weights."""
    progress: Progress


def folder_of(stage: Path, step: int) -> Path:
    return stage / f"step-{step:010d}"


def steps_on_disk(stage: Path) -> list[int]:
    """Steps of all checkpoint folders, complete or not, oldest first."""
    if not stage.is_dir():
        return []
    return sorted(int(m.group(1)) for m in (FOLDER.fullmatch(p.name) for p in stage.iterdir()) if m)


def _manifest(step: int, files: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return {"format": 1, "step": step, "files": files}


def _file_entry(data: bytes) -> dict[str, Any]:
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def _write_file(path: Path, data: bytes) -> dict[str, Any]:
    """Write a file and flush it to disk; returns its entry in the manifest."""
    with naming(path), path.open("xb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    return _file_entry(data)


def needed_bytes(snapshot: Snapshot) -> int:
    """Upper bound on the disk space that a checkpoint takes."""
    tensors = (*snapshot.model.values(), *snapshot.train_state.values())
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors) + MARGIN_BYTES


def write_checkpoint(
    stage: Path, snapshot: Snapshot, before_manifest: Callable[[], None] | None = None, again: bool = False
) -> Path:
    """Write one checkpoint atomically; returns its folder. `before_manifest` may prevent the commit by raising.

    `again`: this process has tried before, so files of the step that exist already are its own.

    Errors: FileExistsError if the step has a checkpoint already: a run writes each step once, so another process is
    writing. DiskFull before anything is written. OSError for other file system errors.
    """
    folder = folder_of(stage, snapshot.progress.step)
    if (folder / "MANIFEST.json").exists():
        if not again:
            raise FileExistsError(f"{folder} already exists: another process writes this stage; nothing was written")
        (folder / "MANIFEST.json").unlink()
    if folder.exists():
        shutil.rmtree(folder)  # left by a writer that died before it committed
    needed, free = needed_bytes(snapshot), free_bytes(stage)
    if free is not None and free < needed:
        log.error("%s: a checkpoint needs %d bytes and %d are free", stage, needed, free)
        # The message leaves out the free bytes, which change with every restart: repeated failures must read the same.
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
    """File name -> content, checked against the manifest. Errors: those of `check_checkpoint`."""
    contents: dict[str, bytes] = {}
    for name in ("MANIFEST.json", *CONTENT):
        try:
            contents[name] = read_regular(folder / name)
        except FileNotFoundError:
            raise CheckpointDamaged(f"{folder / name} is missing") from None
        except (IsADirectoryError, NotARegularFile) as error:
            raise CheckpointDamaged(f"{folder / name} cannot be read: {error.strerror}") from None
    try:
        manifest = parse_json(contents.pop("MANIFEST.json"))
        files = dict(manifest["files"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointDamaged(f"{folder}: no usable MANIFEST.json ({error})") from None
    actual = _manifest(int(folder.name.removeprefix("step-")), {name: _file_entry(contents[name]) for name in CONTENT})
    if manifest != actual:
        differing = [name for name in CONTENT if files.get(name) != actual["files"][name]] or ["its step or format"]
        raise CheckpointDamaged(f"{folder} does not match its MANIFEST.json: {', '.join(differing)}")
    return contents


def check_checkpoint(folder: Path) -> None:
    """Raise CheckpointDamaged unless the manifest exists and matches the folder and its files.

    Errors: OSError for a file that cannot be read, which may be intact.
    """
    _contents(folder)


def _read_snapshot(folder: Path) -> Snapshot:
    contents = _contents(folder)
    try:
        model, train_state = load(contents[CONTENT[0]]), load(contents[CONTENT[1]])
        progress = Progress.from_json(parse_json(contents[CONTENT[2]]))
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise CheckpointDamaged(f"{folder} cannot be read: {error}") from None
    return Snapshot(model, train_state, progress)


def read_checkpoint(folder: Path, pause: Pause | None = None) -> Snapshot:
    """Check and load one checkpoint to CPU, with retries on transient file system errors.

    Errors: CheckpointDamaged; OSError if the retries fail too.
    """
    return retried(lambda _: _read_snapshot(folder), f"reading {folder}", pause)


def read_newest_checkpoint(stage: Path) -> Snapshot | None:
    """The newest intact checkpoint of a stage; damaged ones are logged and skipped.

    Errors: OSError for one that cannot be read: it may be intact, and resuming from an older one would delete it.
    """
    for step in reversed(steps_on_disk(stage)):
        folder = folder_of(stage, step)
        if not (folder / "MANIFEST.json").exists():
            log.warning("%s was being written when its writer ended; skipped", folder)
            continue
        try:
            return read_checkpoint(folder)
        except CheckpointDamaged as error:
            log.error("damaged checkpoint skipped: %s", error)
    return None


def committed_steps(stage: Path) -> list[int]:
    """Steps with a committed checkpoint, which may have been damaged since."""
    return [step for step in steps_on_disk(stage) if (folder_of(stage, step) / "MANIFEST.json").exists()]


def delete_old_checkpoints(stage: Path, keep: int, *protected: int | None) -> None:
    """Delete all but the newest `keep` checkpoints and the `protected` steps (best, rollback)."""
    steps = [s for s in steps_on_disk(stage) if s not in protected]
    for step in steps[:-keep]:
        folder = folder_of(stage, step)
        (folder / "MANIFEST.json").unlink(missing_ok=True)  # first, so that a half-deleted checkpoint does not count
        shutil.rmtree(folder)


def delete_checkpoints_after(stage: Path, step: int) -> None:
    """Delete the checkpoints after `step`, incomplete or damaged ones that the resumed run writes again."""
    for later in steps_on_disk(stage):
        if later > step:
            shutil.rmtree(folder_of(stage, later))


class Writer:
    """Writes checkpoints in its own thread, one at a time; an error is raised at the next call.

    The thread retries transient file system errors while training continues, until the next checkpoint is due.
    """

    def __init__(self, stage: Path, keep: int, guard: Callable[[int], None], pause: Pause | None = None) -> None:
        """`guard(step)` is called before the manifest is written and raises to prevent it (the lease was lost)."""
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
                self._warn_of_low_space(snapshot)
            else:
                self._guard(step)  # a successor may have started during the pause; its files must stay
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

    def _warn_of_low_space(self, snapshot: Snapshot) -> None:
        needed, free = needed_bytes(snapshot), free_bytes(self._stage)
        if not self._warned and free is not None and free < WARNING_LEVEL * needed:
            self._warned = True
            log.warning(
                "%s: %s are free and a checkpoint takes %s; make room before the disk is full",
                self._stage,
                readable(free),
                readable(needed),
            )

    def wait(self) -> None:
        """Wait for the current write. Errors: what the last write raised."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error
