"""What of a run's recipe and origin others are shown: by wandb, and by the report's page, which is made to be mailed.

Nothing else of them goes there. The recipe's slurm section is held back, as its `setup` is shell, in which people
export keys; so are the command and the host, which are nobody's business.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from pipeline.recipe.file import recipe_hash
from pipeline.recipe.schema import Recipe
from pipeline.run.files import read_json_if_there
from pipeline.run.layout import RunFolder

OF_PROVENANCE = (
    *("commit", "created", "machine", "processor", "cores", "gpus", "python"),
    *("recipe_sha256", "data_sha256", "versions"),
)


def public_recipe(recipe: Recipe) -> dict[str, Any]:
    """The resolved recipe as plain values."""
    return recipe.model_dump(mode="json", exclude={"slurm"})


def public_provenance(run: Path) -> dict[str, Any]:
    """What may be told of a run directory's provenance.json; empty for a run that has none. Errors: ValueError for a
    damaged file."""
    origin = read_json_if_there(RunFolder(run).provenance) or {}
    return {key: origin[key] for key in OF_PROVENANCE if key in origin}


def config_of(recipe: Recipe, run: Path) -> dict[str, Any]:
    """Both, as wandb's config of a run."""
    return {**public_recipe(recipe), "origin": public_provenance(run)}


CPUS = Path("/proc/cpuinfo")
SOURCE = Path(__file__).resolve().parents[1]
"""The package of this project, in the checkout that it is imported from."""


def processor_model() -> str:
    """The first model that the kernel names, or at least the architecture where it names none."""
    try:
        lines = CPUS.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.machine())


VERSIONS_OF = (
    *("torch", "torchvision", "ray", "deepspeed", "ffcv", "numpy", "numba", "scipy", "pyautoattack"),
    *("safetensors", "pyarrow", "wandb"),
)


NVIDIA_SMI_S = 20.0
"""How long nvidia-smi may take."""


def _commit() -> str | None:
    """Of the checkout that the code is imported from; None (unknown) where it is not one, as in an installed wheel."""
    git = shutil.which("git")
    if git is None:
        return None

    def output(*arguments: str) -> str | None:
        done = subprocess.run([git, "-C", str(SOURCE), *arguments], capture_output=True, text=True, timeout=10)
        return done.stdout.strip() if done.returncode == 0 else None

    # A wheel in a virtual environment may lie inside the checkout of something else, which does not track it.
    return output("rev-parse", "HEAD") if output("ls-files", "__init__.py") else None


def _gpus() -> list[str]:
    """Model and driver of each GPU of this machine; none without an NVIDIA driver that answers. No torch here."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return []
    query = [command, "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=NVIDIA_SMI_S)
    except (OSError, subprocess.TimeoutExpired):
        return []
    rows = [line.rpartition(",") for line in done.stdout.splitlines() if "," in line]
    return [f"{name.strip()}, driver {driver.strip()}" for name, _, driver in rows] if done.returncode == 0 else []


def collect_provenance(recipe: Recipe, data_sha256: dict[str, str]) -> dict[str, Any]:
    return {
        "command": sys.argv,
        "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "host": platform.node(),
        "machine": platform.machine(),
        "processor": processor_model(),
        "cores": len(os.sched_getaffinity(0)),
        "gpus": _gpus(),
        "python": platform.python_version(),
        "commit": _commit(),
        "recipe_sha256": recipe_hash(recipe),
        "data_sha256": data_sha256,
        "versions": {name: metadata.version(name) for name in VERSIONS_OF},
    }
