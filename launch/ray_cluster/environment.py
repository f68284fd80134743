"""Environment, token and memory of every process of a Ray cluster. Does not import Ray."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

OBJECT_STORE_BYTES = 128 * 1024 * 1024
"""Small: images come from FFCV and weights go through the run directory, not through Ray."""

RAY_ENDED = 69
"""Exit code of a local driver whose Ray cluster has died (EX_UNAVAILABLE)."""
LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
"""For a cluster of one machine: Ray listens on 127.0.0.1 only, as it does by default on macOS. Set it before Ray is
imported."""


def ray_environment(token: Path, scratch: Path, gpu: bool) -> dict[str, str]:
    """Environment variables for the head, nodes and driver, inherited by the workers.

    `scratch` is the cluster's temporary folder on this node, also used by libraries (TMPDIR).
    """
    environment = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "TMPDIR": str(scratch),
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        # Prestarted workers lack Ray Train's environment, and are never used.
        "RAY_prestart_worker_first_driver": "0",
        # Ray's default of nice 15 starves training when anything else runs on the node.
        "RAY_worker_niceness": "0",
        # Ray would kill workers when others use the memory; the kernel and SLURM enforce limits.
        "RAY_memory_monitor_refresh_ms": "0",
        "RAY_TRAIN_METRICS_ENABLED": "0",
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    if (cache := _compiled_code()) is not None:
        environment["TORCHINDUCTOR_CACHE_DIR"] = cache
    if not gpu:
        environment |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    return environment


def _compiled_code() -> str | None:
    """Folder for what torch.compile compiles, which outlives the cluster: torch's own lies in TMPDIR.

    None if the user has named one, or has no home to write to.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    writable = os.access(cache if cache.is_dir() else cache.parent, os.W_OK)
    if "TORCHINDUCTOR_CACHE_DIR" in os.environ or not writable:
        return None
    return str(cache / "hydra-pipeline" / "compiled")


def write_token(path: Path) -> None:
    """A random token that only this user can read. Errors: FileExistsError."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as stream:
        stream.write(secrets.token_hex(32))
