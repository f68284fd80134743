"""What a machine must offer to processes: shared memory, a temporary folder, open files."""

from __future__ import annotations

import os
import resource
import subprocess
import tempfile
from pathlib import Path

from launch.doctor.outcome import Outcome, ProgressCallback, Subject
from launch.ray_cluster.environment import OBJECT_STORE_BYTES
from launch.ray_cluster.scratch import scratch_parent
from pipeline.run.disk import free_bytes, readable

SHARED_MEMORY = Path("/dev/shm")
SHARED_BYTES = 2 * OBJECT_STORE_BYTES
"""Ray's object store, and as much again for NCCL's buffers and the processes that write data files."""
TEMPORARY_BYTES = 10**9
"""Ray's logs and sessions, torch.compile's kernels."""
OPEN_FILES = 4096
"""Ray warns below this number."""
RUN_S = 20.0


def check_shared_memory(subject: Subject, progress: ProgressCallback) -> Outcome:
    """Room for Ray's object store and NCCL."""
    fix = "a larger one (docker run --shm-size 8g; elsewhere the administrator: mount -o remount,size=8g /dev/shm)"
    try:
        status = os.statvfs(SHARED_MEMORY)
    except OSError as error:
        return Outcome("fail", f"{SHARED_MEMORY}: {error.strerror}", "mount a tmpfs there")
    free, size = status.f_bavail * status.f_frsize, status.f_blocks * status.f_frsize
    text = f"{SHARED_MEMORY} has {readable(free)} of {readable(size)} free"
    if free < SHARED_BYTES:
        return Outcome("fail", f"{text}; Ray and NCCL need {readable(SHARED_BYTES)}", fix)
    if not os.access(SHARED_MEMORY, os.W_OK | os.X_OK):
        return Outcome("fail", f"{SHARED_MEMORY} may not be written by this user", "chmod 1777 /dev/shm, by its owner")
    return Outcome("pass", text)


def check_temporary_folder(subject: Subject, progress: ProgressCallback) -> Outcome:
    """The parent of clusters' folders: its space, and whether a program in it may be run."""
    folder = scratch_parent()
    other = "export TMPDIR=... to a short path on a local disk"
    try:
        executable = _runs_program(folder)
    except OSError as error:
        return Outcome("fail", f"{folder} cannot be used: {error.strerror or error}", other)
    free = free_bytes(folder)
    if free is not None and free < TEMPORARY_BYTES:
        return Outcome("fail", f"{folder} has {readable(free)} free of {readable(TEMPORARY_BYTES)} needed", other)
    if not executable:
        compiles = subject.recipe is not None and subject.recipe.engine.mode == "compiled"
        text = f"{folder} is mounted noexec: what torch.compile and Triton make there cannot be loaded"
        return Outcome("fail" if compiles else "warn", text, other)
    return Outcome("pass", f"{folder}, {'' if free is None else readable(free) + ' free, '}executable")


def _runs_program(folder: Path) -> bool:
    """Whether a program in a new folder there may be run. Errors: OSError if none can be written."""
    with tempfile.TemporaryDirectory(prefix="doctor-", dir=folder) as inner:
        program = Path(inner) / "program"
        program.write_text("#!/bin/sh\nexit 0\n")
        program.chmod(0o700)
        try:
            return subprocess.run([program], timeout=RUN_S).returncode == 0
        except PermissionError:
            return False


def check_open_files(subject: Subject, progress: ProgressCallback) -> Outcome:
    """The limit of open files. Ray raises it itself up to the hard limit, but not for processes that it inherits."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    enough = [limit == resource.RLIM_INFINITY or limit >= OPEN_FILES for limit in (soft, hard)]
    if not enough[1]:
        text = f"at most {hard} may be open at once, for good; Ray needs {OPEN_FILES}"
        return Outcome("fail", text, "ask the administrator (limits.conf: nofile; docker run --ulimit nofile=65536)")
    if not enough[0]:
        text = f"{soft} may be open at once; Ray needs {OPEN_FILES}"
        line = f"ulimit -n {OPEN_FILES * 2 if hard == resource.RLIM_INFINITY else min(hard, OPEN_FILES * 2)}"
        return Outcome("warn", text, f"slurm.setup: ['{line}']" if subject.on_slurm else f"{line} before the command")
    return Outcome("pass", f"{'any number' if soft == resource.RLIM_INFINITY else soft} may be open at once")
