"""The model of this machine's processor. No torch here: a login node notes it as well."""

from __future__ import annotations

import platform
from pathlib import Path

CPUS = Path("/proc/cpuinfo")


def processor_model() -> str:
    """The first model that the kernel names, or at least the architecture where it names none."""
    try:
        lines = CPUS.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.machine())
