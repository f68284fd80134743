"""Leases: each stage has one writer, the holder of its lease.

`lease.json` in the stage folder names the holder (token, host, pid, heartbeat). A second start is refused with the
holder's name. A holder is replaced if it is dead on this host, or if its heartbeat is older than STALE_AFTER_S. Writers
check the token before they commit, so that a holder replaced while frozen cannot overwrite its successor's files.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.run.disk import retried
from pipeline.run.files import atomic_write_json, make_folder, read_json
from pipeline.run.locks import exclusive
from pipeline.run.records import Count, Record

log = logging.getLogger(__name__)

LEASE = "lease.json"
HEARTBEAT_S = 10.0
STALE_AFTER_S = 90.0


class LeaseHeld(ValueError):
    """Another process is writing this stage; the message names it."""


@dataclass(frozen=True)
class Holder:
    token: str
    host: str
    pid: int
    started_ticks: int
    heartbeat: float


class _Lease(Record):
    token: str
    host: str
    pid: Count
    started_ticks: Count
    heartbeat: float


def _started_ticks(pid: int) -> int | None:
    """Start time of a process in clock ticks since boot, which identifies a reused pid. None: no such process."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def read_holder(folder: Path) -> Holder | None:
    """The stage's holder, if any. Errors: ValueError for a damaged lease; OSError for a transient error."""
    path = folder / LEASE
    if not path.exists():
        return None
    value = read_json(path)
    try:
        return parse_holder(value)
    except ValueError as error:
        raise ValueError(f"{path} is not a lease: {error}") from None


def parse_holder(value: Any) -> Holder:
    """The content of lease.json. Errors: ValueError."""
    return Holder(**_Lease.parse(value).model_dump())


def is_stale(holder: Holder) -> bool:
    if holder.host == socket.gethostname():
        return _started_ticks(holder.pid) != holder.started_ticks
    return time.time() - holder.heartbeat > STALE_AFTER_S


def refuse_if_held(folder: Path) -> None:
    """Raise LeaseHeld, naming the holder, if a living process writes this stage."""
    try:
        holder = read_holder(folder)
    except ValueError:
        return  # leases are replaced by rename, so a torn one was left by a dead writer
    if holder is not None and not is_stale(holder):
        raise LeaseHeld(
            f"{folder} is being written by pid {holder.pid} on {holder.host}; "
            "wait for it, or end that process and start again"
        )


def check_token(folder: Path, token: str) -> None:
    """Raise LeaseHeld unless `token` still holds the stage."""
    holder = retried(lambda _: read_holder(folder), f"reading the lease of {folder}")
    if holder is None or holder.token != token:
        who = "nobody" if holder is None else f"pid {holder.pid} on {holder.host}"
        raise LeaseHeld(f"{folder} is no longer ours (held by {who}); nothing was written")


class Leases:
    """The leases of a set of stages, renewed by one thread until `release`."""

    def __init__(self, folders: list[Path], patience_s: float = 0.0) -> None:
        """Acquire all of them or none. Errors: LeaseHeld if one is still held after `patience_s`."""
        self.token = secrets.token_hex(16)
        self._folders: list[Path] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._renew_until_stopped, name="lease-heartbeat", daemon=True)
        try:
            deadline, pause = time.monotonic() + patience_s, threading.Event()
            for folder in folders:
                while not self._try_acquire(folder, last_try=time.monotonic() >= deadline):
                    pause.wait(1.0)
        except BaseException:
            self.release()
            raise
        self._thread.start()

    def _record(self) -> dict[str, Any]:
        pid = os.getpid()
        ticks = _started_ticks(pid)
        assert ticks is not None
        return asdict(Holder(self.token, socket.gethostname(), pid, ticks, time.time()))

    def _try_acquire(self, folder: Path, *, last_try: bool) -> bool:
        try:
            self._acquire(folder)
        except LeaseHeld:
            if last_try:
                raise
            return False
        return True

    def _acquire(self, folder: Path) -> None:
        make_folder(folder)
        with exclusive(folder / ".lease.lock"):
            refuse_if_held(folder)
            atomic_write_json(folder / "lease.json", self._record())
            self._folders.append(folder)

    def _renew_until_stopped(self) -> None:
        while self._folders and not self._stop.wait(HEARTBEAT_S):
            for folder in list(self._folders):
                try:
                    with exclusive(folder / ".lease.lock"):
                        check_token(folder, self.token)
                        atomic_write_json(folder / "lease.json", self._record())
                except LeaseHeld as error:
                    log.error("lease lost; this process writes no more checkpoints of this stage: %s", error)
                    self._folders.remove(folder)
                except (OSError, ValueError) as error:
                    log.error("the lease of %s could not be renewed; retrying at the next heartbeat: %s", folder, error)

    def release(self) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(timeout=HEARTBEAT_S)
        for folder in self._folders:
            with exclusive(folder / ".lease.lock"):
                holder = read_holder(folder)
                if holder is not None and holder.token == self.token:
                    (folder / "lease.json").unlink()
        self._folders = []
