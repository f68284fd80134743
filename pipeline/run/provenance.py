"""Provenance of a run: what it was started with (commit, versions, data, hardware of the submitting host), and the part
of it that is public.

Only the public part goes to wandb and to the report's page, which people send around. It leaves out the recipe's
`slurm` section (its `setup` is shell code, which may export keys), the command line and the host name.
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

from pipeline.recipe.file import file_hash, load_resolved_recipe, recipe_hash
from pipeline.recipe.schema import Recipe
from pipeline.run.layout import RunFolder
from pipeline.run.records import Provenance

SOURCE = Path(__file__).resolve().parents[1]
"""The `pipeline` package that is imported."""
CPUS = Path("/proc/cpuinfo")
NVIDIA_SMI_S = 20.0
"""Timeout of nvidia-smi."""
VERSIONS_OF = (
    *("torch", "torchvision", "ray", "deepspeed", "ffcv", "numpy", "numba", "scipy", "pyautoattack"),
    *("safetensors", "pyarrow", "wandb"),
)
"""Packages whose versions are recorded."""
PUBLIC_KEYS = (
    *("commit", "created", "machine", "processor", "cores", "gpus", "python"),
    *("recipe_sha256", "data_sha256", "versions"),
)
"""Keys of provenance.json that are public."""


def collect_provenance(recipe: Recipe, data_sha256: dict[str, str]) -> dict[str, Any]:
    """Contents of a new run's provenance.json."""
    return {
        "command": sys.argv,
        "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "host": platform.node(),
        "machine": platform.machine(),
        "processor": processor_model(),
        "cores": len(os.sched_getaffinity(0)),
        "gpus": gpu_models(),
        "python": platform.python_version(),
        "commit": _commit(),
        "recipe_sha256": recipe_hash(recipe),
        "data_sha256": data_sha256,
        "versions": {name: metadata.version(name) for name in VERSIONS_OF},
    }


def load_run_recipe(run: Path) -> Recipe:
    """The recipe of a run. Errors: RecipeError; ValueError if it was edited after the run was started."""
    path, recipe = RunFolder(run).recipe, load_resolved_recipe(RunFolder(run).recipe)
    provenance = Provenance.read_if_there(RunFolder(run).provenance)
    started_with = provenance.recipe_sha256 if provenance is not None else None
    if started_with not in (None, recipe_hash(recipe)) and started_with != file_hash(path):
        raise ValueError(
            f"{path} was edited after the run was started: it is not the recipe of provenance.json (recipe_sha256 "
            f"{started_with}); restore it, or start a run of the edited recipe: python -m launch run {path} --name NEW"
        )
    return recipe


def processor_model() -> str:
    """Model name of the first CPU that the kernel lists, or the architecture if it lists no model."""
    try:
        lines = CPUS.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.machine())


def gpu_models() -> list[str]:
    """Model and driver of each GPU of this machine; empty if no NVIDIA driver responds. Does not import torch."""
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


def _commit() -> str | None:
    """Commit of the checkout that contains the package; None if there is none, as for an installed wheel."""
    git = shutil.which("git")
    if git is None:
        return None

    def output(*arguments: str) -> str | None:
        done = subprocess.run([git, "-C", str(SOURCE), *arguments], capture_output=True, text=True, timeout=10)
        return done.stdout.strip() if done.returncode == 0 else None

    # A wheel's virtual environment may be inside another project's checkout, which does not track the package.
    return output("rev-parse", "HEAD") if output("ls-files", "__init__.py") else None


def public_recipe(recipe: Recipe) -> dict[str, Any]:
    """The public sections of a resolved recipe, as plain values."""
    return recipe.model_dump(mode="json", exclude={"slurm"})


def public_provenance(run: Path) -> dict[str, Any]:
    """The public part of a run's provenance.json, empty if there is none. Errors: ValueError for a damaged file."""
    provenance = Provenance.read_if_there(RunFolder(run).provenance)
    values = {} if provenance is None else provenance.model_dump(mode="json", exclude_unset=True)
    return {key: values[key] for key in PUBLIC_KEYS if key in values}


def config_of(recipe: Recipe, run: Path) -> dict[str, Any]:
    """wandb's config of a run: its public recipe and provenance."""
    return {**public_recipe(recipe), "origin": public_provenance(run)}
