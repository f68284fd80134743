"""How every process of a cluster is set up: environment, token, memory. Ray itself is not imported here."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

OBJECT_STORE_BYTES = 128 * 1024 * 1024
"""Nothing large goes through Ray: images come from FFCV, weights through the run directory."""


def ray_environment(token: Path, scratch: Path, gpu: bool) -> dict[str, str]:
    """What every process of a cluster needs: head, nodes, driver, and through them the workers.

    `scratch` is the cluster's temporary folder on this node, where libraries put theirs too.
    """
    environment = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "TMPDIR": str(scratch),
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        # Workers that Ray starts before they are asked for lack Ray Train's environment, and are never used.
        "RAY_prestart_worker_first_driver": "0",
        # Ray would have workers give way to whatever else runs on the node (nice 15): training then starves.
        "RAY_worker_niceness": "0",
        # Nor have them die for memory that others took: who takes too much is for the kernel and SLURM to say.
        "RAY_memory_monitor_refresh_ms": "0",
        "RAY_TRAIN_METRICS_ENABLED": "0",
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    }
    if not gpu:
        environment["DS_ACCELERATOR"] = "cpu"
    return environment


def write_token(path: Path) -> None:
    """A random token that only this user can read. Errors: FileExistsError."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as stream:
        stream.write(secrets.token_hex(32))
